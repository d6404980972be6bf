"""What a process reads from the environment of each launcher."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.errors import UsageError
from internevo.parallel.world import LauncherInfo, first_host, local_world_size, read_launcher

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
    assert read_launcher({**SLURM, **TORCHRUN}, launcher="slurm") == UNDER_SLURM


def test_without_a_launcher_the_process_is_alone() -> None:
    assert read_launcher({}) == ALONE
    # In the shell of a Slurm job, but not started with srun.
    assert read_launcher({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) == ALONE


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_missing_variable_of_torchrun_is_named(missing: str) -> None:
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UsageError, match=rf"^{missing} is not set: start this command with torchrun"):
        read_launcher(env, launcher="torch")


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NODELIST"])
def test_a_missing_variable_of_slurm_is_named(missing: str) -> None:
    env = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(UsageError, match=rf"^{missing} is not set: start this command with srun"):
        read_launcher(env, launcher="slurm")


names = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
numbers = st.from_regex(r"[0-9]{1,4}", fullmatch=True)
ranges = st.one_of(numbers, st.tuples(numbers, numbers).map("-".join))
hosts = st.one_of(
    names.map(lambda name: (name, name)),
    st.tuples(names, st.lists(ranges, min_size=1, max_size=4)).map(
        lambda part: (f"{part[0]}[{','.join(part[1])}]", part[0] + part[1][0].split("-")[0])
    ),
)
"""(part of a node list, first host in it)."""


@given(parts=st.lists(hosts, min_size=1, max_size=4))
def test_the_first_host_of_a_node_list(parts: list[tuple[str, str]]) -> None:
    assert first_host(",".join(text for text, _ in parts)) == parts[0][1]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[003-005,9],x", "gpu003"), ("a,b", "a"), ("one", "one"), ("rack-1-[12,14]", "rack-1-12"), ("n01.site", "n01.site")],
)
def test_node_lists_as_slurm_writes_them(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",", "[1-2]"])
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
