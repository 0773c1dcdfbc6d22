"""Linear layers and attention layers in a tree of parameters: the places of adapters."""

from collections.abc import Callable

from rlhf_jax.core.types import Params


def is_linear(path: str, node: Params) -> bool:
    """True for a dictionary that holds the leaves of a `Linear`: a router's kernel is not one."""
    return ("kernel" in node or "kernel_values" in node) and path.rpartition("/")[2] != "router"


def is_attention(node: Params) -> bool:
    """True for a dictionary that holds an attention layer with keys and values of their own."""
    return all(isinstance(node.get(name), dict) for name in ("query", "key", "value", "output"))


def map_linears(change: Callable[[str, Params], Params], params: Params) -> Params:
    """`change(path, leaves)` of every linear layer; all else stays."""
    return map_nodes(is_linear, change, params)


def map_nodes(
    wanted: Callable[[str, Params], bool],
    change: Callable[[str, Params], Params],
    node: Params,
    path: str = "",
) -> Params:
    """`change(path, node)` of every dictionary that is `wanted`, from the outermost; all else stays."""
    if wanted(path, node):
        return change(path, node)
    return {
        key: map_nodes(wanted, change, child, f"{path}/{key}" if path else key)
        if isinstance(child, dict)
        else child
        for key, child in node.items()
    }
