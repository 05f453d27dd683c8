"""The CPU layer is explicit, reversible and pinned to Megatron-Core's version; ranks report, time out and clean up."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from platform import libc_ver

import pytest
import torch

from megatron.bridge import platform
from megatron.bridge.errors import BridgeError
from megatron.bridge.platform import launch
from megatron.bridge.platform.cpu_layer import cpu_layer, replaced
from megatron.bridge.platform.launch import RankFailed, run_layout, run_ranks, share_of_cores
from megatron.bridge.platform.memory_limit import memory_limit

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer is for machines without CUDA")


def names():
    """What stands under every name that the layer may replace."""
    owners = (torch, torch.Tensor, torch.nn.Module, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.distributed)
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}


def test_the_layer_is_taken_back_without_a_trace():
    before = names()
    with cpu_layer():
        assert platform.cpu_layer_enabled()
        assert len(replaced()) > 30
        assert names() != before
    after = names()
    assert {key: value for key, value in after.items() if before.get(key) is not value} == {}
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(1, device="cuda")


def test_cuda_means_cpu_inside_the_layer():
    with cpu_layer():
        made = [
            torch.empty(2, device="cuda"),
            torch.zeros(2, device=torch.device("cuda", 0)),
            torch.arange(3, device=torch.cuda.current_device()),
            torch.tensor([1.0]).to("cuda"),
            torch.tensor([1.0]).cuda(),
            torch.ones(2).new_zeros(2, device="cuda"),
            torch.nn.Linear(2, 2).to("cuda").weight,
            torch.nn.Linear(2, 2).cuda().weight,
            torch.tensor([1.0], pin_memory=True),
            torch.ones(2).pin_memory(),
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.int64).dtype == torch.int64


def test_other_devices_are_left_alone():
    with cpu_layer():
        with torch.device("meta"):
            assert torch.nn.Linear(2, 2).weight.device.type == "meta"
            assert torch.empty(1).device.type == "meta"
        assert torch.empty(1).device.type == "cpu"


def test_random_state_is_the_default_generators():
    with cpu_layer():
        torch.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        torch.cuda.manual_seed(5)
        assert torch.equal(torch.rand(3), first)


def test_importing_the_platform_changes_nothing():
    code = (
        "import megatron.bridge.platform as p, torch; assert not p.cpu_layer_enabled();"
        "import megatron.bridge.conversion.live; assert not p.cpu_layer_enabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_layer_is_pinned_to_the_megatron_core_it_was_tested_with():
    version = importlib.metadata.version("megatron-core").split(".")
    assert (int(version[0]), int(version[1])) == (0, 19), "run the parity tests, then widen the range in pyproject.toml"
    (requirement,) = [
        line for line in importlib.metadata.requires("megatron-bridge-conversion") if line.startswith("megatron-core")
    ]
    assert ">=0.19" in requirement
    assert "<0.20" in requirement


def test_a_process_started_plainly_is_a_world_of_one():
    code = (
        "from megatron.bridge import platform; platform.initialize_distributed(); platform.initialize_distributed();"
        "import torch; t = torch.ones(1); torch.distributed.all_reduce(t);"
        "print(platform.rank(), platform.world_size(), float(t), platform.backend())"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["0", "1", "1.0", "gloo"]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "6",
                "SLURM_LOCALID": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NODELIST": "n1",
            },
            (5, 6, 2),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # inside salloc, not started by srun
        ({}, (0, 1, 0)),
    ],
)
def test_the_place_among_ranks_is_read_from_the_launcher(monkeypatch, environment, place):
    for name in list(os.environ):
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (platform.rank(), platform.world_size(), platform.local_rank()) == place


def rank_and_sum():
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def test_ranks_return_their_results_in_order():
    assert run_ranks(3, rank_and_sum) == [(0, 3), (1, 3), (2, 3)]


def test_one_rank_runs_in_this_process_and_more_are_forked(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_layout(2, lambda: (os.getpid(), platform.world_size()))[1] == 2
    assert run_layout(2, os.getpid) != os.getpid()


def fail_on(rank, action):
    if platform.rank() == rank:
        action()
    torch.distributed.barrier()


def test_a_failing_rank_gives_its_exception_and_does_not_leave_its_peers_waiting():
    def refuse():
        raise BridgeError("rank one says no")

    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank one says no") as caught:
        run_ranks(2, fail_on, 1, refuse, timeout=60, grace=2)
    assert isinstance(caught.value.__cause__, BridgeError)
    assert time.monotonic() - started < 30


def test_a_rank_that_dies_is_told_with_its_signal():
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_ranks(2, fail_on, 1, lambda: os.kill(os.getpid(), signal.SIGKILL), timeout=60, grace=2)


def test_a_rank_that_hangs_is_stopped_at_the_time_out():
    def record_and_hang():
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"\[rank 0, 1\] did not finish \(time-out of 2 s"):
        run_ranks(2, record_and_hang, timeout=2)
    assert time.monotonic() - started < 20


def test_an_exception_that_does_not_pickle_still_arrives_as_text():
    class Local(Exception):
        pass

    def fail():
        raise Local("only here")

    with pytest.raises(RankFailed, match="only here"):
        run_ranks(1, fail)


def test_code_that_runs_inside_backward_is_inside_the_layer_too():
    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + torch.ones(1, device="cuda")

    with cpu_layer():
        x = torch.zeros(1, requires_grad=True)
        Recompute.apply(x).backward()
        assert x.grad.item() == 2.0
        y = torch.zeros(1, requires_grad=True)
        (gradient,) = torch.autograd.grad(Recompute.apply(y), y)
        assert gradient.item() == 2.0


def test_a_rank_does_not_fork_ranks():
    def fork_again():
        run_ranks(2, os.getpid)

    with pytest.raises(RankFailed, match="this process is a rank already"):
        run_ranks(1, fork_again)


def test_an_interrupted_rank_interrupts_the_run():
    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it from birth
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)  # another of the process's threads may have taken the signal, and the main one hears of it late

    with pytest.raises(KeyboardInterrupt):
        run_ranks(2, fail_on, 1, interrupted, timeout=60, grace=2)


def test_every_rank_gets_its_share_of_the_cores_unless_openmp_was_told(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (share_of_cores(2), share_of_cores(16)) == (4, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_of_cores(2) == 3


def test_unequal_parts_are_gathered_scattered_and_exchanged():
    def work():
        rank, sizes = torch.distributed.get_rank(), [2, 0, 3]
        mine = torch.full((sizes[rank], 2), float(rank + 1))
        gathered = torch.empty(5, 2)
        torch.distributed.all_gather(list(gathered.split(sizes)), mine)
        scattered = torch.empty(sizes[rank], 2)
        torch.distributed.reduce_scatter(scattered, list((gathered * (rank + 1)).split(sizes)))
        exchanged = torch.empty(3 * sizes[rank], 2)
        received = torch.tensor([sizes[rank]] * 3)
        torch.distributed.all_to_all_single(
            exchanged, gathered, output_split_sizes=received, input_split_sizes=torch.tensor(sizes)
        )
        return gathered, scattered, exchanged

    whole = torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0])[:, None].expand(5, 2)
    for rank, (gathered, scattered, exchanged) in enumerate(run_ranks(3, work)):
        own = whole.split([2, 0, 3])[rank]
        assert torch.equal(gathered, whole)
        assert torch.equal(scattered, own * 6)
        assert torch.equal(exchanged, torch.cat([own] * 3))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux")
def test_groups_share_one_network_device():
    def work():
        dist = torch.distributed
        alone = [dist.new_group([rank]) for rank in (0, 1, 0, 1)]
        together = [dist.new_group([0, 1], timeout=timedelta(seconds=40 + index)) for index in range(3)]
        sums = []
        for group in (alone[dist.get_rank()], *together):
            sums.append(torch.tensor([dist.get_rank() + 1.0]))
            dist.all_reduce(sums[-1], group=group)
        threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in together]
        return [int(each) for each in sums], threads.count("gloo_tcp_loop"), timeouts

    for rank, (sums, event_loops, timeouts) in enumerate(run_ranks(2, work)):
        assert sums == [rank + 1, 3, 3, 3]
        assert event_loops == 1
        assert timeouts == [timedelta(seconds=40 + index) for index in range(3)]


def test_work_beyond_its_memory_limit_fails_and_the_limit_is_taken_back():
    with memory_limit(2**28), pytest.raises(MemoryError):
        bytearray(2**30)
    assert len(bytearray(2**29)) == 2**29


def test_ranks_meet_elsewhere_when_their_port_was_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        free, ports = launch._free_port, [other.getsockname()[1]]
        monkeypatch.setattr(launch, "_free_port", lambda: ports.pop() if ports else free())
        assert run_ranks(2, torch.distributed.get_rank, timeout=60) == [0, 1]
    assert ports == []


_FAULTS = """
import ctypes, resource
from megatron.bridge.platform.allocation import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**26)))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = [faults(), faults()]
assert keep_freed_memory()
faults()
print(min(given_back), faults())
"""


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    output = subprocess.run([sys.executable, "-c", _FAULTS], check=True, capture_output=True, text=True).stdout
    given_back, kept = map(int, output.split())
    assert given_back > 16 > kept  # 64 MB: 16,384 pages, fewer where they are huge
