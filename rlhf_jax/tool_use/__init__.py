"""Tools that a model may call, and the calls that it writes. Knows neither models nor tokens."""

from rlhf_jax.retrieval.bm25 import Index
from rlhf_jax.retrieval.chunks import (
    Chunk,
    CitedAnswer,
    RetrievalIndex,
    numbered_prompt,
    read_answer,
    split_document,
)
from rlhf_jax.tool_use.calls import Call, CallError, parse_calls
from rlhf_jax.tool_use.functions import make_tools
from rlhf_jax.tool_use.tools import (
    Tool,
    ToolError,
    answer_calls,
    calculator,
    call_pattern,
    retriever,
    worker_tool,
)

__all__ = [
    "Call",
    "CallError",
    "Chunk",
    "CitedAnswer",
    "Index",
    "RetrievalIndex",
    "Tool",
    "ToolError",
    "answer_calls",
    "calculator",
    "call_pattern",
    "make_tools",
    "numbered_prompt",
    "parse_calls",
    "read_answer",
    "retriever",
    "split_document",
    "worker_tool",
]
