import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.util.torch_device import map_single_threaded, resolve_device, resolve_precision

# Tests of storage alone run without torch.
torch = pytest.importorskip("torch")


def test_a_rank_of_torchrun_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    assert resolve_device("auto") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "4")
    for local_rank, expected in (("0", "cuda:0"), ("3", "cuda:3")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert resolve_device("auto") == resolve_device("cuda") == expected
    assert resolve_device("cuda:2") == "cuda:2"
    assert resolve_device("cpu") == "cpu"


def test_devices_that_are_not_there_are_refused() -> None:
    assert resolve_device("cpu:0") == "cpu"
    for device in ("tpu9", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=f"--device: expected auto, cpu or .* got '{device}'"):
            resolve_device(device)


@pytest.mark.parametrize("device", ["mps", "mps:0"])
def test_a_device_without_streams_is_refused_though_it_exists(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    with pytest.raises(ConfigError, match=f"got '{device}' .*no streams.*; use auto or cpu"):
        resolve_device(device)


def test_auto_precision_is_float32_on_a_cpu() -> None:
    assert resolve_precision("auto", "cpu", without_bfloat16="float16") == "float32"
    assert resolve_precision("float16", "cpu", without_bfloat16="float32") == "float16"


def test_auto_precision_on_a_gpu_is_bfloat16_or_what_the_caller_prefers_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        for other in ("float16", "float32"):
            expected = "bfloat16" if supported else other
            assert resolve_precision("auto", "cuda:0", without_bfloat16=other) == expected


def test_items_are_shared_by_threads_whose_operations_are_not() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            together = threading.Barrier(threads)

            def work(item: int, together: threading.Barrier = together) -> tuple[int, int]:
                together.wait(timeout=30)
                return item, torch.get_num_threads()

            for _ in range(2):
                found = map_single_threaded(work, range(6))
                assert found == [(item, 1) for item in range(6)]
                assert torch.get_num_threads() == threads
        # A thread that begins later has the process's number.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
