"""Well-formed calls of the collectives' operators, those of a communicator's life included."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from abiding import Communicator
from abiding.testing.cases.reduce_rms import RmsCase
from abiding.testing.guarded import GuardedTensor, guarded
from calls import Call

raw = torch.ops.abiding_custom_ar
LIFE = "abiding_custom_ar::"

OPERATORS = (
    *("all_reduce", "all_reduce.out", LIFE + "all_reduce", LIFE + "announce_call", "reduce_rms", "reduce_rms_qk"),
    *("minimax_allreduce_rms", "minimax_allreduce_rms_qk"),
)
LIFE_OPERATORS = tuple(
    LIFE + name
    for name in (
        *("init_custom_ar", "dispose", "register_buffer", "get_graph_buffer_ipc_meta", "register_graph_buffers"),
        *("allocate_shared_buffer_and_handle", "open_mem_handle", "free_shared_buffer"),
        *("allocate_shared_memory_and_handle", "close_mem_handle", "announce_closed", "announce_interrupted"),
        *("configure", "fault", "fault_text", "clear", "probe_send", "probe_missing"),
    )
)


# --- upstream's table -------------------------------------------------------------------------------------------------


class Workspaces:
    """Memory of one device, as the callers of upstream's operators allocate it."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.addresses: list[int] = []
        self._kept: list[Tensor] = []

    def add(self, contents: Tensor) -> int:
        """The address of memory with these contents: from the lifecycle's operators on a CPU, which take no other."""
        if self.device.type == "cuda":
            self._kept.append(contents.to(self.device))
            return self._kept[-1].data_ptr()
        size = contents.numel() * contents.element_size()
        self.addresses.append(raw.allocate_shared_memory_and_handle(size)[0])
        ctypes.memmove(self.addresses[-1], contents.data_ptr(), size)
        return self.addresses[-1]

    def free(self) -> None:
        while self.addresses:
            raw.free_shared_buffer(self.addresses.pop())


@contextlib.contextmanager
def minimax_tables(ranks: int, device: torch.device | str = "cpu", *, slot_bytes: int = 4096) -> Iterator[list[Tensor]]:
    """The `workspace` of every rank, which the callers of vLLM's operators allocate."""
    memory = Workspaces(device)
    slots = [memory.add(torch.full((3 * slot_bytes // 4,), -0.0)) for _ in range(ranks)]
    yield [
        torch.tensor(
            [0] * 2 * ranks
            + slots
            + [memory.add(torch.zeros(3, dtype=torch.int32)), memory.add(torch.tensor([0, slot_bytes]))],
            device=device,
        )
        for _ in range(ranks)
    ]
    memory.free()


# --- well-formed calls of one rank ------------------------------------------------------------------------------------


@cache
def communicator() -> Communicator:
    return Communicator(device="cpu")


@cache
def a_communicator_that_is_closed() -> int:
    with Communicator(device="cpu") as comm:
        return comm._handle


def well_formed(op: str, rng: random.Random) -> Call:
    """An accepted call of a rank that is alone."""
    comm = communicator()
    shared: list[int] = []
    guards: dict[str, GuardedTensor]
    args: dict[str, Any]
    tables = contextlib.ExitStack()
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    if op == LIFE + "announce_call":
        message = guarded((5, 7), rng.choice([dtype, torch.int64, torch.complex64]), fill=0)
        guards, args = {"message": message}, {"fa": comm._handle, "message": message.tensor}
    elif "all_reduce" in op:
        shape = rng.choice([(0,), (1,), (33,), (5, 7), (2, 3, 4)])
        x, out = (guarded(shape, dtype, fill=torch.randn(shape)) for _ in range(2))
        guards = {"input": x, "out": out}
        args = {"input": x.tensor, "state": comm._token, "comm": comm._handle, "out": out.tensor}
        if op == LIFE + "all_reduce":
            guards = {"inp": x, "out": out}
            args = {"fa": comm._handle, "inp": x.tensor, "out": out.tensor}
            args |= {"reg_buffer": 0, "reg_buffer_sz_bytes": 1 << 20}
        elif op == "all_reduce":
            del args["out"], guards["out"]
    else:
        case = RmsCase(rng.choice([0, 1, 5, 40]), rng.choice([1, 24, 64]), rng.choice([1, 8]), dtype)
        inputs = case.make(1, seed=rng.randrange(1 << 30))[0]
        assert inputs.wk is not None
        is_qk = op.endswith("qk")
        rows = inputs.rows if is_qk else inputs.rows[:, : case.q].contiguous()
        names = ["qkv", "weight_q", "weight_k"] if is_qk else ["input", "weight"]
        if op.startswith("minimax"):
            names = [name.replace("weight", "norm_weight") for name in names]
        guards = {
            name: guarded(tensor.shape, dtype, fill=tensor)
            for name, tensor in zip(names, (rows, inputs.wq, inputs.wk), strict=False)
        }
        args = {name: guard.tensor for name, guard in guards.items()}
        if op.startswith("minimax"):
            args["workspace"] = tables.enter_context(minimax_tables(1))[0]
            shared = args["workspace"][2:].tolist()
            if is_qk:
                args |= {"q_size": case.q, "kv_size": case.kv}
            args |= {"rank": 0, "nranks": 1, "eps": 1e-6}
        else:
            args |= {"state": comm._token, "comm": comm._handle, "eps": 1e-6}
    return Call(op, args, guards, strangers=[*strangers(), *shared], close=lambda _: tables.close())


def strangers() -> list[int]:
    """Handles and addresses of others: of a closed communicator, of Python, of a tensor, of nobody."""
    return [a_communicator_that_is_closed(), id(raw), communicator()._token.data_ptr(), communicator()._handle + 1, 1]


# --- a communicator's life --------------------------------------------------------------------------------------------


class World:
    """Two ranks of this process, made by the raw operators."""

    def __init__(self) -> None:
        self.workspaces, self.handles = zip(
            *(raw.allocate_shared_memory_and_handle(raw.meta_size()) for _ in range(2)), strict=True
        )
        self.opened: int = raw.open_mem_handle(self.handles[1])
        self.communicators = [self.communicator(rank) for rank in range(2)]

    def communicator(self, rank: int = 0) -> int:
        handle: int = raw.init_custom_ar(list(self.workspaces), torch.empty(0, dtype=torch.uint8), rank, True)
        return handle


the_world = cache(World)


def of_a_life(op: str, rng: random.Random) -> Call:
    """An accepted call of the operators that make, steer and end a communicator."""
    world, name = the_world(), op.removeprefix(LIFE)
    fa = world.communicator() if name == "dispose" else world.communicators[0]
    own: int = raw.allocate_shared_memory_and_handle(64)[0] if name == "free_shared_buffer" else 0
    opened: int = raw.open_mem_handle(world.handles[1]) if name == "close_mem_handle" else 0
    data = torch.empty(0, dtype=torch.uint8)
    handle = world.handles[0].clone()
    arguments: dict[str, dict[str, Any]] = {
        "init_custom_ar": {
            "ipc_tensors": list(world.workspaces),
            "rank_data": data,
            "rank": rng.randrange(2),
            "fully_connected": True,
        },
        "register_buffer": {"fa": fa, "ipc_tensors": list(world.workspaces)},
        "register_graph_buffers": {"fa": fa, "handles": [[], []], "offsets": [[], []]},
        "allocate_shared_buffer_and_handle": {"size": 64},
        "allocate_shared_memory_and_handle": {"size": 64},
        "open_mem_handle": {"mem_handle": handle},
        "free_shared_buffer": {"ptr": own},
        "close_mem_handle": {"ptr": opened},
        "configure": {"fa": fa, "timeout_s": 1.0, "max_blocks": 8, "one_shot_bytes": -1},
        "fault": {"fa": fa, "look": True},
        "fault_text": {"fa": fa, "look": True},
    }
    # The free operators may have these; what they must not take away is the world.
    addresses = [own, opened] if name.startswith(("free", "close")) else [*world.workspaces, world.opened]

    def close(result: Any) -> None:
        for give_back, thing in (
            (raw.dispose, result if name == "init_custom_ar" else fa if name == "dispose" else None),
            (raw.close_mem_handle, result if name == "open_mem_handle" else opened),
            (raw.free_shared_buffer, result[0] if result and name.startswith("allocate") else own),
        ):
            if thing:
                with contextlib.suppress(RuntimeError):  # the call has done it
                    give_back(thing)

    guards: dict[str, GuardedTensor] = {}
    strange = [*strangers(), *addresses, *(address + 64 for address in addresses)]
    return Call(op, arguments.get(name, {"fa": fa}), guards, strangers=strange, close=close)
