"""What a process reads from the environment of each launcher."""

import contextlib
import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from internevo.errors import InternEvoError, UsageError
from internevo.parallel.launcher import LauncherInfo, first_host, launched_by, local_world_size, read_launcher
from internevo.parallel.world import join, of_this_start

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu7", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[7-8]",
}  # fmt: skip
UNDER_TORCHRUN = LauncherInfo(5, 8, 1, "env://")
UNDER_SLURM = LauncherInfo(5, 8, 1, "tcp://gpu7:8888")
ALONE = LauncherInfo(0, 1, 0, None)


@pytest.mark.parametrize("launcher", [None, "torch"])
def test_under_torchrun(launcher: str | None) -> None:
    assert read_launcher(TORCHRUN, launcher=launcher) == UNDER_TORCHRUN


@pytest.mark.parametrize("launcher", [None, "slurm"])
def test_under_slurm(launcher: str | None) -> None:
    assert read_launcher(SLURM, launcher=launcher) == UNDER_SLURM


def test_under_slurm_the_first_host_and_the_port_can_be_given() -> None:
    assert read_launcher({**SLURM, "MASTER_ADDR": "10.0.0.1"}, 99).address == "tcp://10.0.0.1:99"


def test_under_slurm_the_older_name_of_the_number_of_tasks_is_read() -> None:
    older = {("SLURM_NPROCS" if name == "SLURM_NTASKS" else name): value for name, value in SLURM.items()}
    assert read_launcher(older) == UNDER_SLURM


def test_in_a_slurm_job_torchrun_comes_first() -> None:
    both = {**SLURM, **TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert read_launcher(both) == UNDER_TORCHRUN
    assert read_launcher({**SLURM, **TORCHRUN}, 8888, "slurm") == UNDER_SLURM


def test_without_a_launcher_the_process_is_alone() -> None:
    assert read_launcher({}) == ALONE
    # In the shell of a Slurm job, but not started with srun.
    assert read_launcher({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) == ALONE


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_of_torchrun_is_named(missing: str) -> None:
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UsageError, match=rf"^{missing} is not set: start this command with torchrun"):
        read_launcher(env, launcher="torch")


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NODELIST"])
def test_a_missing_variable_of_slurm_is_named(missing: str) -> None:
    env = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(UsageError, match=rf"^{missing} is not set: start this command with srun"):
        read_launcher(env, launcher="slurm")


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_without_the_rest_is_named_as_the_cause(missing: str) -> None:
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UsageError, match=rf"^{missing} is not set although RANK is.*torchrun, or unset RANK$") as error:
        read_launcher(env)
    assert "--launcher" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "x"}, {"RANK": "8"}, {"RANK": "-1"}, {"RANK": "1.5"}, {"RANK": " 1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "n"}, {"LOCAL_RANK": "8"}, {"LOCAL_RANK": "\u0665"}, {"MASTER_PORT": "http"}, {"MASTER_PORT": "65536"},
    ],
)  # fmt: skip
def test_a_wrong_variable_of_torchrun_is_named_with_its_value(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"^[A-Z_]+ = '.*' is not a number .*: start this command with torchrun"):
        read_launcher({**TORCHRUN, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [{"SLURM_PROCID": "8"}, {"SLURM_NTASKS": "?"}, {"SLURM_STEP_ID": "a"}, {"SLURM_JOB_ID": "x"}, {"MASTER_PORT": "0"}],
)
def test_a_wrong_variable_of_slurm_is_named_with_its_value(wrong: dict[str, str]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UsageError, match=rf"^{name} = '{re.escape(value)}' is not a number .*: start this command with srun"):
        read_launcher({**SLURM, **wrong})


SHELLS = {
    "srun --pty": {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PTY_PORT": "40123"},
    "srun --pty in salloc -n 8": {"SLURM_STEP_ID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
    "the shell of salloc": {"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "8"},
    "the script of sbatch": {"SLURM_STEP_ID": "4294967291", "SLURM_NTASKS": "8"},
    "an empty RANK": {"SLURM_STEP_ID": "", "RANK": ""},
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_in_an_allocation_is_no_rank(shell: str) -> None:
    env = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **SHELLS[shell]}
    assert launched_by(env) is None
    assert read_launcher(env) == ALONE


def test_the_nodes_of_the_step_come_before_those_of_the_job() -> None:
    assert read_launcher({**SLURM, "SLURM_STEP_NODELIST": "gpu8"}).address == "tcp://gpu8:8888"
    assert read_launcher({**SLURM, "SLURM_STEP_NODELIST": "gpu8", "MASTER_ADDR": "fe80::1"}).address == "tcp://[fe80::1]:8888"


def slurm_port(port: int | None = None, **env: str) -> int:
    return int(str(read_launcher({**SLURM, **env}, port).address).rpartition(":")[2])


def test_the_port_is_the_given_one_or_that_of_the_environment() -> None:
    assert slurm_port(99, MASTER_PORT="1234", SLURM_JOB_ID="7") == 99
    assert slurm_port(MASTER_PORT="1234", SLURM_JOB_ID="7") == 1234
    with pytest.raises(UsageError, match="--port 65536 is not"):
        slurm_port(65536)


@given(job=st.integers(1, 2**31), step=st.integers(0, 25))
def test_jobs_and_steps_on_one_node_have_different_ports(job: int, step: int) -> None:
    """All ranks of a step know its port, which is not one that the system gives to other programs."""
    ports = [slurm_port(SLURM_JOB_ID=str(job + j), SLURM_STEP_ID=str(step + s)) for j in range(3) for s in range(3)]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {**SLURM, "SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.port)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InternEvoError, match=rf"another run, uses the port of 127.0.0.1:{other.port}: set MASTER_PORT"), join():
        pass


# Slurm's node lists, written and expanded independently of first_host: a list of names, each with any number of lists in
# brackets; such a list has numbers and ranges with leading zeros, and several of them count like the digits of a number.


def expand_range(text: str) -> list[str]:
    low, dash, high = text.partition("-")
    return [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)] if dash else [low]


def expand_name(pieces: list[str | list[str]]) -> list[str]:
    """Expands ["rack", ["1-2"], "gpu", ["0", "4-5"]] to rack1gpu0, rack1gpu4, ..., rack2gpu5."""
    lists = [[p] if isinstance(p, str) else [host for text in p for host in expand_range(text)] for p in pieces]
    return ["".join(choice) for choice in itertools.product(*lists)]


def written(pieces: list[str | list[str]]) -> str:
    return "".join(p if isinstance(p, str) else f"[{','.join(p)}]" for p in pieces)


digits = st.from_regex(r"[0-9]{1,4}", fullmatch=True)
ranges = st.one_of(digits, st.tuples(digits, st.integers(0, 20)).map(lambda r: f"{r[0]}-{int(r[0]) + r[1]:0{len(r[0])}d}"))
lists = st.lists(ranges, min_size=1, max_size=4)
first_text = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
later_text = st.from_regex(r"[a-z0-9.-]{1,8}", fullmatch=True)
node_names = st.tuples(first_text, st.lists(st.one_of(lists, later_text), max_size=4)).map(lambda name: [name[0], *name[1]])


@given(parts=st.lists(node_names, min_size=1, max_size=4))
def test_the_first_host_of_a_node_list(parts: list[list[str | list[str]]]) -> None:
    assert first_host(",".join(written(part) for part in parts)) == expand_name(parts[0])[0]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-005,9],x", "gpu003"), ("a,b", "a"), ("one", "one"), ("rack-1-[12,14]", "rack-1-12"), ("n01.site", "n01.site"),
        ("rack[1-2]gpu[0-3]", "rack1gpu0"), ("n[1-4]-ib", "n1-ib"), ("c[001-002].cluster.local", "c001.cluster.local"),
        ("n[1,3-4]-ib[0,2],m[1-2]", "n1-ib0"), ("r[2]b[07-08,11]-n[1-2].x,z", "r2b07-n1.x"), ("a.site,n[1-2]", "a.site"),
    ],
)  # fmt: skip
def test_node_lists_as_slurm_writes_them(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
    assert read_launcher({**SLURM, "SLURM_JOB_NODELIST": nodes}).address == f"tcp://{host}:8888"


@pytest.mark.parametrize("nodes", ["", ",", ",a", "[1-2]", "n[", "n[1-2", "n]", "n[]", "n[a-b]", "n[1[2]]", "n 1", "(null)[1"])
def test_a_node_list_that_cannot_be_read_is_shown(nodes: str) -> None:
    with pytest.raises(UsageError, match=r"SLURM_JOB_NODELIST = .* cannot be read"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({}, 1), ({"LOCAL_WORLD_SIZE": "4"}, 4), ({"SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 4), ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "1"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, 1),
    ],
)  # fmt: skip
def test_the_number_of_ranks_on_this_node(env: dict[str, str], ranks: int) -> None:
    assert local_world_size(env) == ranks


def test_each_start_of_the_ranks_has_keys_of_its_own() -> None:
    """In the same store, also after a start in which a rank has asked for a name and then died."""
    store = dist.HashStore()
    store.set("asks/1", "a word of a rank that was killed")
    with ThreadPoolExecutor(3) as ranks:
        for start in ("1", "2"):
            found = list(ranks.map(lambda rank: of_this_start(store, rank, 3), range(3)))
            assert not found[0].check(["run folder"])
            found[1].set("run folder", start)
            assert {own.get("run folder").decode() for own in found} == {start}


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_has_left_shows_errors_as_before(fails: bool) -> None:
    """PyTorch's hook writes the rank before each line of a traceback, once more in each world."""
    before = sys.excepthook
    for _ in range(2):
        with contextlib.suppress(UsageError), join(ALONE):
            assert sys.excepthook is not before
            if fails:
                raise UsageError("an error of the run")
        assert sys.excepthook is before
    try:
        with join(ALONE):
            mine = sys.excepthook = lambda *_: None
        assert sys.excepthook is mine  # what the program has set stays
    finally:
        sys.excepthook = before
