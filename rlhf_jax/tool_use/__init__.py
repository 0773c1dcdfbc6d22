"""Tools that a model may call, and the calls that it writes. Knows neither models nor tokens."""

from rlhf_jax.tool_use.calls import Call, CallError, parse_calls
from rlhf_jax.tool_use.retrieval import Index
from rlhf_jax.tool_use.tools import Tool, answer_calls, calculator, call_pattern, retriever, worker_tool

__all__ = [
    "Call",
    "CallError",
    "Index",
    "Tool",
    "answer_calls",
    "calculator",
    "call_pattern",
    "parse_calls",
    "retriever",
    "worker_tool",
]
