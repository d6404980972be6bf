"""Data of the hub is downloaded once on each machine, however long that takes, while no rank is in a collective."""

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from internevo.parallel.launcher import read_launcher
from internevo.parallel.layout import Layout
from internevo.parallel.world import join
from internevo.text.tokenizer import train_bpe
from internevo.train import parts
from internevo.train.config import load_config
from tests.conftest import write_config
from tests.pool import Pool

TIMEOUT, DOWNLOAD = 2.0, 3.0
"""Seconds that a collective may take, and that a download takes."""


def open_data(path: Path, disks: Path, hosts: list[str], shared: bool) -> tuple[int, list[int]]:
    """Opens the data of a config whose dataset is on a slow hub. Returns how often this rank has downloaded it, and tokens."""
    rank, downloads = int(os.environ["RANK"]), 0
    disk = disks / ("all" if shared else hosts[rank])

    def download(name: str, **rest: Any) -> str:
        nonlocal downloads
        if not disk.is_dir():
            downloads += 1
            time.sleep(DOWNLOAD)
            disk.mkdir(parents=True)  # fails if another rank has done it meanwhile
            (disk / "train.jsonl").write_text("".join(json.dumps({"text": f"{n} cats"}) + "\n" for n in range(50)))
        return str(disk)

    with (
        mock.patch("huggingface_hub.snapshot_download", download),
        mock.patch.object(socket, "gethostname", return_value=hosts[rank]),
        join(read_launcher(os.environ, launcher="torch"), timedelta(seconds=TIMEOUT)) as world,
    ):
        config = load_config(path, [])
        source, _ = parts._open_data(config, world, Layout.from_config(config, world.size), mock.MagicMock())
        found = source.next_rows(source.start_position(), 4, range(4))
        source.close()
    return downloads, [int(token) for row in found.rows for token in row.tokens]


@pytest.mark.parametrize("shared", [False, True])
def test_a_download_is_made_once_on_each_disk_and_may_take_longer_than_a_collective(
    tmp_path: Path, pool: Pool, shared: bool
) -> None:
    pytest.importorskip("huggingface_hub")
    tokenizer = train_bpe(["the cat sat"] * 3, 300, tmp_path / "tokenizer")
    changes = {"data__type": "streaming", "data__tokenizer_path": str(tokenizer), "data__num_worker": 0}
    path = write_config(tmp_path, None, "slow", **changes, model__vocab_size=300, data__train_folder="some/corpus")
    hosts = ["first", "first", "second", "second"]
    found = pool.run_alone(open_data, 4, path, tmp_path / "disks", hosts, shared)
    downloads = [downloads for downloads, _ in found]
    assert downloads[0] == 1 and sum(downloads) == (1 if shared else 2) and downloads[1] == 0
    assert all(tokens == found[0][1] != [] for _, tokens in found)
