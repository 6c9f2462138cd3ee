"""The only place that touches private names of torch; each is looked up once and has a stand-in.

| what we need | private name | without it |
| --- | --- | --- |
| "does autograd run this call?" | `torch._C._current_graph_task_id` | never said to be in backward: recomputation under reentrant checkpointing counts twice, any other is measured and thrown away |
| "does functorch run this call?" | `torch._C._functorch.peek_interpreter_stack` | never said to: our operations fail under `vmap`, which is caught, noticed, and leaves that module out |
| hide our operations from modes | `torch.utils._python_dispatch._disable_current_modes` | nothing is measured while a mode is active |
| is a mode active? | `torch._C._len_torch_dispatch_stack` | modes are always switched off, a few microseconds a tensor; without both nothing is measured at all |
| does a function mode see what we ask of a tensor? | `torch._C._len_torch_function_stack` | always said to: function modes are switched off for each tensor, a microsecond dearer |
| leave grad mode cheaply | `torch._C._set_grad_enabled` | `torch.set_grad_enabled`, half a microsecond dearer |
| ignore function modes | `torch._C.DisableTorchFunction` | they see our operations, `torch.set_default_device` for one |
| keep Dynamo from hooks and what they call | `torch._C._dynamo.eval_frame.set_code_exec_strategy` with `_FrameExecStrategy` and `_FrameAction`, the mark `_torchdynamo_disable` | functions go through `torch.compiler.disable`, 0.4 us a call; methods of hook objects may be compiled by themselves and then do nothing |
| "is this a fake tensor?" | `torch._subclasses.fake_tensor.is_fake` | judged by the name of its class |
| is a `step()` called by that of another optimizer? | code of the wrapper that `Optimizer.profile_hook_step` makes | the innermost call counts: what a subclass does after `super().step()` is not in the recorded parameters |
| the scale of the gradient scaler that calls this step | the frame of `GradScaler.step`, `GradScaler._scale` | gradients of activations stay multiplied by it |
| is a module compiled? | `Module._compiled_call_impl`, the class `OptimizedModule` | hooks below it are put on: one more graph where they were there at its first call |
| is a compiled call going on around this one? | `torch._C._dynamo.eval_frame.get_eval_frame_callback` | the same |
| was a caller compiled? | frames of `torch/_dynamo/eval_frame.py` | never said to be: in such functions `compiled="eager"` sees the first call of a step alone |
| "has the call of a module ended?", by whatever exception | the frame of `Module._call_impl`, its `called_always_called_hooks` | after Ctrl-C in the model, `compiled="eager"` goes on uncompiled until the next step or `close()` |
| run a function while a graph is traced, not in it | the mark `_dynamo_marked_constant` that `torch.compiler.assume_constant_result` sets | `torch.compiler.assume_constant_result` does no more than set it |
| call back when the backward pass ends | `torch.autograd.Variable._execution_engine`, its `queue_callback` | gradients that a loop without an optimizer clears by itself are not recorded |
| children and parameters of a module, without computing | `Module._modules`, `Module._parameters` | the public iterators: a child that a module holds twice has one of its names; parameters that are replaced later are not logged with the last step |
| how often a tensor was changed in place | `Tensor._version` | steps without any optimizer are not seen, which is said; what a container returns is measured again |
| hooks of the user's on a parameter | `Tensor._backward_hooks`, `Tensor._post_accumulate_grad_hooks` | any may have some: the last step of a model that is gone lacks the root's own parameters |
| a forward hook is put back at the next sampled step | `Module._forward_hooks` | it is registered anew, 5 us dearer a module |
| many tensors in one row | `torch._C._nn.flatten_dense_tensors` | each is made flat by a call of its own, 0.6 us dearer a tensor |
| flat parameters of FSDP1 | `FullyShardedDataParallel._handle` and attributes of its `flat_param` | shards count as copies: not said to be shards, and not added up over ranks |
| the store that ranks meet at | `torch.distributed.distributed_c10d._get_default_store` | `ranks="merge"` is refused |
| our own writer behind torch's | `SummaryWriter._get_file_writer` | ours is put there afterwards, and an event file of torch's without records lies beside it; see `instrument.record.writer` |

Why hiding matters: an operation of ours that selective activation checkpointing can see shifts its count of
operations, and the recomputation then hands the user's backward a tensor of ours: wrong gradients, no error.
"""

from __future__ import annotations

import collections
import contextlib
import operator
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Unseen",
    "are_bare",
    "called_from_compiled_function",
    "calling_scale",
    "can_hide",
    "children_of",
    "flat_parameters",
    "flattened",
    "has_hooks",
    "in_backward",
    "in_compiled_call",
    "is_asked_unseen",
    "is_compiled",
    "is_fake",
    "is_transformed",
    "meeting_store",
    "never_compile",
    "never_compile_code",
    "parameters_of",
    "put_back",
    "run_while_tracing",
    "runs_within_another_step",
    "version_of",
    "when_backward_ends",
    "when_call_ends",
]


def _lookup(path: str) -> Any:
    """The object behind a dotted path that starts at torch, or None where this torch lacks it."""
    import importlib

    head, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(head), name)
    except (ImportError, AttributeError):
        pass
    owner: Any = torch
    for part in path.split(".")[1:]:
        owner = getattr(owner, part, None)
    return owner


_graph_task_id: Callable[[], int] | None = _lookup("torch._C._current_graph_task_id")
_interpreter_stack: Callable[[], object] | None = _lookup("torch._C._functorch.peek_interpreter_stack")
_modes_active: Callable[[], int] | None = _lookup("torch._C._len_torch_dispatch_stack")
_function_modes: Callable[[], int] | None = _lookup("torch._C._len_torch_function_stack")
_disable_modes: Callable[[], contextlib.AbstractContextManager[Any]] | None = _lookup(
    "torch.utils._python_dispatch._disable_current_modes"
)
_set_grad_enabled: Callable[[bool], object] = _lookup("torch._C._set_grad_enabled") or torch.set_grad_enabled
_disable_torch_function: Callable[[], contextlib.AbstractContextManager[Any]] = (
    _lookup("torch._C.DisableTorchFunction") or contextlib.nullcontext
)
_is_fake: Callable[[object], bool] | None = _lookup("torch._subclasses.fake_tensor.is_fake")
_flatten: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = _lookup("torch._C._nn.flatten_dense_tensors")
_engine: Any = _lookup("torch.autograd.Variable._execution_engine")
_module_attributes = frozenset(vars(torch.nn.Module()))
_has_version = _lookup("torch.Tensor._version") is not None
_HOOK_LISTS = "torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks"
_has_hook_lists = None not in map(_lookup, _HOOK_LISTS)


def in_backward() -> bool:
    """Whether autograd runs the caller: a hook of its own, or a recomputation under checkpointing."""
    return _graph_task_id is not None and _graph_task_id() != -1


def when_backward_ends(function: Callable[[], None]) -> bool:
    """Have a function called once the backward pass that is going on has ended; whether that can be had."""
    queue: Callable[[Callable[[], None]], None] | None = getattr(_engine, "queue_callback", None)
    if queue is None or not in_backward():
        return False
    queue(function)
    return True


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a tracer runs the caller; their tensors have no values to read."""
    is_tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # public, if not in lists
    return is_tracing or (_interpreter_stack is not None and _interpreter_stack() is not None)


def is_asked_unseen() -> bool:
    """Whether nobody sees what is asked of a plain tensor besides its values, and what is done then can be hidden.

    Dispatch modes never see size, strides, and where it lies, since no operation answers; function modes do.
    """
    return _function_modes is not None and not _function_modes() and can_hide()


def can_hide() -> bool:
    """Whether operations done now can be hidden from the dispatch modes that are active now."""
    return _disable_modes is not None or (_modes_active is not None and _modes_active() == 0)


def children_of(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The children of a module under their names."""
    if "_modules" not in _module_attributes:
        return list(module.named_children())
    own = module._modules
    return [(name, child) for name, child in own.items() if child is not None] if own else []


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """The module's own dictionary of parameters; reading its attributes may compute, as under `spectral_norm`."""
    if "_parameters" not in _module_attributes:
        return dict(module.named_parameters(recurse=False, remove_duplicate=False))
    own: Any = module._parameters
    return own if isinstance(own, dict) else dict(own.items())  # script modules have a wrapper of another kind


def flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The values of tensors of one type, one tensor behind the other, as a new tensor of shape (n,)."""
    if _flatten is not None and len(tensors) > 1:  # of one it makes a view
        return _flatten(tensors)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


version_of: Callable[[torch.Tensor], int | None] = operator.attrgetter("_version") if _has_version else lambda t: None
"""How often a tensor was changed in place, where torch tells; changes through ``.data`` do not count."""


def put_back(handle: RemovableHandle, module: torch.nn.Module, hook: object) -> bool:
    """Put a forward hook back that was taken off by its handle, which then takes it off again; whether that was done.

    To register it anew takes 5 us, and makes objects that keep the garbage collector busy.
    """
    hooks: Any = module._forward_hooks if "_forward_hooks" in _module_attributes else ()
    is_its_own = type(hooks) is collections.OrderedDict and handle.hooks_dict_ref() is hooks
    if is_its_own:
        hooks[handle.id] = hook
    return is_its_own


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether somebody has registered a hook on a tensor, or may have."""
    return not _has_hook_lists or bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def are_bare(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether on none of several tensors anything of the user's hangs: no hook, no attribute."""
    every = (_backward_hooks, _accumulate_hooks, vars)
    return _has_hook_lists and not any(any(map(read, tensors)) for read in every)


_backward_hooks, _accumulate_hooks = map(operator.attrgetter, ("_backward_hooks", "_post_accumulate_grad_hooks"))


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether this is a fake tensor, as export, tracing and memory estimators use."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    if _is_fake is not None:
        return bool(_is_fake(tensor))
    return "Fake" in type(tensor).__name__


def never_compile_code(code: types.CodeType) -> bool:
    """Tell Dynamo to compile neither frames of this code nor what they call; whether that was possible.

    Imports Dynamo where it is not there yet; every optimizer of torch imports it too.
    """
    frames = "torch._C._dynamo.eval_frame."
    set_strategy, strategy, action = (
        _lookup(frames + name) for name in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
    )
    if set_strategy is None or strategy is None or action is None:
        return False
    set_strategy(code, strategy(action.SKIP, action.SKIP))
    return True


def never_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as Dynamo leaves it alone, in frames of its own and where a graph would take it in."""
    if not never_compile_code(function.__code__):
        disabled: Callable[..., Any] = torch.compiler.disable(function)
        return disabled
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # the mark that torch.compiler.disable sets
    return function


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of this module run compiled: `torch.compile(module)`, or one on which `compile()` was called."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def in_compiled_call() -> bool:
    """Whether the caller was called from a compiled function, so that what it calls will be compiled too."""
    callback = _lookup("torch._C._dynamo.eval_frame.get_eval_frame_callback")
    return callback is not None and callable(callback())


def called_from_compiled_function() -> bool:
    """Whether a function made by `torch.compile` is among the callers."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_EVAL_FRAME_FILE):
            return True
        frame = frame.f_back
    return False


def _frame_of(code: types.CodeType | None, frame: types.FrameType | None) -> types.FrameType | None:
    """The innermost frame from this one outwards that runs a code; None where there is none, or no such code."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


class _Farewell:
    """Calls a function when the last that holds it is gone."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._function()


def when_call_ends(function: Callable[[], None]) -> bool:
    """In a hook of a module: have a function called when the call that it belongs to is over; whether that can be had.

    Torch tells hooks of the exceptions below `Exception` alone, so Ctrl-C passes them by. What the frame of the call
    holds goes with it, however the call ends; where an exception ended it, once nobody holds its traceback.
    """
    frame = _frame_of(_CALL_CODE, sys._getframe(1))
    held = frame.f_locals.get("called_always_called_hooks") if frame is not None else None
    if not isinstance(held, set):
        return False
    held.add(_Farewell(function))  # torch looks for the numbers of hooks in this set, and never at what else is there
    return True


_CALL_CODE: types.CodeType | None = getattr(_lookup("torch.nn.Module._call_impl"), "__code__", None)
_EVAL_FRAME_FILE = str(Path("torch", "_dynamo", "eval_frame.py"))
_F = TypeVar("_F", bound=Callable[..., Any])


def run_while_tracing(function: _F) -> _F:
    """The function as Dynamo calls it itself while it traces, with constants, leaving nothing in the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # without importing Dynamo, which takes seconds
    return function


def _step_wrapper_code() -> types.CodeType | None:
    wrap = _lookup("torch.optim.Optimizer.profile_hook_step")
    return getattr(wrap(lambda optimizer: None), "__code__", None) if wrap is not None else None


_STEP_CODE = _step_wrapper_code()
"""Code of the function that stands for `step` in every optimizer class and calls the hooks."""


def calling_scale() -> torch.Tensor | None:
    """The scale of the `GradScaler` whose `step` is calling this optimizer hook, of shape (); None without one.

    Only the locals of that one frame are read: reading those of others would keep the user's objects alive.
    """
    frame: types.FrameType | None = sys._getframe(1)
    for _ in range(_SCALER_DISTANCE):
        if frame is None:
            return None
        if frame.f_code is _SCALER_STEP_CODE:
            scale = getattr(frame.f_locals.get("self"), "_scale", None)
            return scale if isinstance(scale, torch.Tensor) else None
        frame = frame.f_back
    return None


_SCALER_STEP_CODE: types.CodeType | None = getattr(_lookup("torch.amp.GradScaler.step"), "__code__", None)
_SCALER_DISTANCE = 16
"""Frames between an optimizer hook and `GradScaler.step`: half a dozen, and some for wrappers of schedulers."""


def runs_within_another_step() -> bool:
    """Whether the optimizer's `step()` that is calling this hook was called by that of an optimizer itself."""
    inner = _frame_of(_STEP_CODE, sys._getframe(1))
    return inner is not None and _frame_of(_STEP_CODE, inner.f_back) is not None


def flat_parameters(model: torch.nn.Module) -> dict[int, tuple[bool | None, bool, bool, int]]:
    """The parameters that FSDP1 manages in a model, by identity.

    Returns:
        For each: whether its values belong into a sum over the ranks, whether it is a shard, whether that is empty,
        and how many elements at its end are padding.
    """
    found: dict[int, tuple[bool | None, bool, bool, int]] = {}
    for module in model.modules():
        if type(module).__name__ != "FullyShardedDataParallel":
            continue
        handle = getattr(module, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if flat is None or not getattr(handle, "uses_sharded_strategy", False):
            continue
        # Under hybrid sharding each group of ranks has a whole copy; the first one counts.
        between = getattr(module, "_inter_node_pg", None)
        is_counted = between is None or torch.distributed.get_rank(between) == 0
        is_used_directly = getattr(flat, "_params", None) is None
        for parameter in (flat,) if is_used_directly else flat._params:
            padding = min(getattr(flat, "_shard_numel_padded", 0), parameter.numel()) if is_used_directly else 0
            found[id(parameter)] = (is_counted, True, parameter.numel() == padding, padding)
    return found


def meeting_store() -> Any:
    """The key-value store that the ranks of the default process group share; None where it cannot be had."""
    find = _lookup("torch.distributed.distributed_c10d._get_default_store")
    return find() if find is not None else None


class Unseen:
    """Context in which our operations change nothing and are seen by nobody.

    No graph is built, no dispatch or function mode sees the operations, subclasses are treated as plain
    tensors, and tensors are ordinary ones even under ``torch.inference_mode``. Costs half a microsecond where
    no mode is active.

    Example:
        >>> with Unseen():
        ...     (torch.ones(2, requires_grad=True) * 2).requires_grad
        False
    """

    __slots__ = ("_grad", "_inner", "_modes")

    def __enter__(self) -> None:
        self._inner = _disable_torch_function()
        self._inner.__enter__()
        self._modes: contextlib.ExitStack | None = None
        self._grad = torch.is_grad_enabled()
        if _modes_active is None or _modes_active() or torch.is_inference_mode_enabled():
            self._modes = contextlib.ExitStack()
            self._modes.enter_context(torch.inference_mode(False))
            if _disable_modes is not None:
                self._modes.enter_context(_disable_modes())
        try:
            _set_grad_enabled(False)
        except BaseException:  # Ctrl-C right behind it: nobody else calls this then
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        if self._modes is not None:
            self._modes.close()
        _set_grad_enabled(self._grad)
        self._inner.__exit__(None, None, None)
