# CPU image, by the README's own steps:
#   docker build -t rlhf_jax .
#   docker run --rm -v "$PWD/runs:/rlhf/runs" rlhf_jax sft --data arithmetic:1 --steps 100 --learning-rate 3e-3 --out runs/sft
FROM python:3.12-slim
WORKDIR /rlhf
COPY pyproject.toml README.md LICENSE /src/
COPY tools/constraints.txt /src/tools/constraints.txt
COPY rlhf_jax /src/rlhf_jax
RUN pip install --no-cache-dir -c /src/tools/constraints.txt "/src[rl,marl,search,quant,gguf,vision,s3,gcs,wandb,trackio,mlflow]"
ENTRYPOINT ["rlhf"]
CMD ["--help"]
