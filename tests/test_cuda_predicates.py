"""What the kernels can't take, and what a machine lacks: each gives its reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stand_in
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tome
import tome_cuda
import tome_reference
from tome import recording
from tome_cuda import library, predicates

X = torch.zeros(1, 4, 2)
SLOT = torch.arange(4, dtype=torch.int32)[None]
OPERATIONS = [name for name in tome_reference.__all__ if name != "max_r"]


def arguments(name: str, x: Tensor) -> tuple[Any, ...]:
    linear, norm = (torch.zeros(2, 2), None), (None, None, 1e-5)
    return {
        "attention": (x[None],) * 3,
        "attend_half": (x, (x[None],) * 3, 1, None, None, 4, 1, True, None, None, linear, None, norm, None),
        "follow": ([SLOT],),
        "homes": (SLOT, 4),
        "linear_gelu": (x, *linear),
        "merge": (x, SLOT, 4),
        "merge_add_norm": (x, x, None, 4, None, None, None, 1e-5),
        "mlp_half": (x, x, linear, "erf", linear, None, norm, None),
        "pair_bias": (x, SLOT.long()),
        "quick_gelu": (x,),
        "restore": (x, None, [SLOT]),
        "rotate": (x[None], x[None], x),
        "swiglu": (x, x),
        "swiglu_norm": (x, x, 2, None, None, 1e-5),
        "unmerge": (x, SLOT),
    }.get(name, (x, 1))


@pytest.mark.parametrize("name", OPERATIONS)
def test_tokens_on_a_cpu(name: str) -> None:
    assert "the tokens are on cpu" in str(tome_cuda.why_not(name, *arguments(name, X)))


def test_what_no_backend_takes_is_for_the_operation_to_refuse() -> None:
    assert tome_cuda.why_not("match", [1.0], 1) is None
    assert tome_cuda.why_not("follow", []) is None
    assert tome_cuda.why_not("convolve", X) == "the extension has no kernel for convolve"


def test_a_missing_library_comes_before_what_it_would_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one there are no head dimensions to compare with."""
    monkeypatch.setattr(library, "_load", lambda: library._Loaded(None, "nothing is built"))
    monkeypatch.setattr(library, "_unsupported_device", library._unsupported_device.__wrapped__)
    with FakeTensorMode():
        x = torch.empty(1, 4, 300, device="cuda", dtype=torch.float16)
        q = x[None]
    assert tome_cuda.why_not("match", x, 1) == "nothing is built"
    assert tome_cuda.why_not("attention", q, q, q) == "nothing is built"
    assert tome_cuda.why_not("mlp_half", *arguments("mlp_half", x)) == "nothing is built"
    assert tome_cuda.why_not("restore", x, None, [SLOT]) == "nothing is built"


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="torch fakes no second GPU where there is just one")
def test_tokens_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: library._Loaded(stand_in.INFO, None))
    monkeypatch.setattr(library, "unsupported_device", lambda index: "the wrong GPU" if index == 1 else None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        wide = torch.empty(1, 4, 300, device="cuda:0")
        double = torch.empty(1, 4, 30, device="cuda:0", dtype=torch.float64)
        other = torch.empty(1, 4, 30, device="cuda:1")
        fine = torch.empty(1, 4, 256, device="cuda:0")
    assert "300 channels, and the kernels take at most 256" in str(tome_cuda.why_not("match", wide, 1))
    assert tome_cuda.why_not("merge", wide, SLOT, 4) is None
    assert "float64" in str(tome_cuda.why_not("merge", x=double))
    assert "float64" in str(tome_cuda.why_not("merge_add_norm", fine, fine, None, 4, None, double, None, 1e-5))
    assert "float64" in str(tome_cuda.why_not("merge_add_norm", fine, fine, norm_dtype=torch.float64))
    assert "float64" in str(tome_cuda.why_not("restore", fine, double, [SLOT]))
    assert tome_cuda.why_not("merge_add_norm", wide, wide, None, 4, None, None, None, 1e-5) is None
    assert tome_cuda.why_not("match", other, 1) == "the wrong GPU"
    assert tome_cuda.why_not("match", keys=fine, r=1) is None
    assert "4 merges, and the kernels follow at most 3" in str(tome_cuda.why_not("restore", fine, None, [SLOT] * 4))
    assert tome_cuda.why_not("restore", fine, None, [SLOT] * 3) is None


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.choose(monkeypatch)


@pytest.mark.usefixtures("chosen")
def test_a_chain_that_is_too_long() -> None:
    assert tome_cuda.why_not("follow", [SLOT] * 3) is None
    assert "4 merges, and the kernels follow at most 3" in str(tome_cuda.why_not("follow", [SLOT] * 4))


@pytest.mark.usefixtures("chosen")
def test_what_rotate_declines() -> None:
    q, table = X[None], torch.zeros(4, 4)
    assert tome_cuda.why_not("rotate", q, q, table) is None
    assert "float64" in str(tome_cuda.why_not("rotate", q, q, table.double()))
    table.requires_grad_()
    assert "no gradient of its table" in str(tome_cuda.why_not("rotate", q, q, table=table))
    with torch.no_grad():
        assert tome_cuda.why_not("rotate", q, q, table) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "torch.float32"),
        ({"d": 40}, "40"),
        ({"dropout_p": 0.1}, "drop"),
        ({"dropout_p": -0.1}, "drop"),
        ({"scale": -1.0}, "-1.0"),
        ({"scale": 0.0}, "0.0"),
        ({"step": 2}, "gaps"),
        ({"n": 0}, "no keys"),
        ({"training": True}, None),
    ],
)
@pytest.mark.usefixtures("chosen")
def test_what_attention_leaves_to_torch(change: dict[str, Any], reason: str | None) -> None:
    """Under every choice of a backend a float32 model runs, and a model in training with dropout."""
    case = {"dtype": torch.float16, "d": 64, "dropout_p": 0.0, "scale": None, "step": 1, "n": 5, "training": False}
    case |= change
    q = torch.zeros(1, 2, case["n"], case["d"] * case["step"], dtype=case["dtype"], device="meta")
    q = q[..., :: case["step"]].requires_grad_(case["training"])
    told = predicates.without_kernel(q, q, q, None, case["scale"], case["dropout_p"])
    assert told is reason or reason in str(told)
    assert tome_cuda.why_not("attention", q, q, q) is None
    assert tome_cuda.remark("attention", q, q, q, None, case["scale"], case["dropout_p"]) == (
        None if told is None else f"by torch: {told}"
    )


def attend(**changed: Any) -> tuple[Any, ...]:
    """Arguments of attend_half that the kernels take, but for what is changed."""
    n, heads, dim, channels = 9, 2, changed.pop("dim", 32), 16
    dtype, form = changed.pop("dtype", torch.bfloat16), changed.pop("form", "views")
    x = torch.zeros(1, n, channels, dtype=dtype)
    forms = {
        "views": (torch.zeros(1, heads, n, dim, dtype=dtype),) * 3,
        "packed": (torch.zeros(1, n, 3 * heads * dim, dtype=dtype),),
        "projected": (x,),
        "gaps": (torch.zeros(1, heads, n, 2 * dim, dtype=dtype)[..., ::2],) * 3,
        "gaps in packed": (torch.zeros(1, n, 6 * heads * dim, dtype=dtype)[..., ::2],),
        "empty": (torch.zeros(1, heads, 0, dim, dtype=dtype),) * 3,
    }
    linear = (torch.zeros(3 * heads * dim, channels, dtype=dtype), None) if form == "projected" else None
    case = {
        "x": x,
        "qkv": forms[form],
        "heads": heads,
        "size": None,
        "slot": None,
        "tokens": 6,
        "prefix": 1,
        "is_weighted": True,
        "scale": None,
        "qkv_linear": linear,
        "proj": (torch.zeros(channels, heads * dim, dtype=dtype), None),
        "gamma": torch.zeros(channels, dtype=dtype),
        "norm": (torch.zeros(channels, dtype=dtype), None, 1e-5),
        "norm_dtype": None,
    }
    assert changed.keys() <= case.keys()
    return tuple((case | changed).values())


def mlp(**changed: Any) -> tuple[Any, ...]:
    """Likewise for mlp_half."""
    dtype = changed.pop("dtype", torch.bfloat16)
    x, fc1, fc2 = (torch.zeros(shape, dtype=dtype) for shape in ((1, 9, 16), (24, 16), (16, 24)))
    case = {"x": x, "y": x, "fc1": (fc1, None), "gelu": "quick", "fc2": (fc2, fc1[0, :16]), "gamma": None}
    case |= {"norm": (None, None, 1e-5), "norm_dtype": None}
    assert changed.keys() <= case.keys()
    return tuple((case | changed).values())


class Watched(Tensor):
    pass


WANTED = torch.zeros(16, dtype=torch.bfloat16, requires_grad=True)
DOUBLE = torch.zeros(16, dtype=torch.float64)


@pytest.mark.parametrize("form", ["views", "packed", "projected"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "scale": 0.3}, None),
        ({"norm_dtype": torch.float32}, None),
        ({"dtype": torch.float32}, "know float16 and bfloat16, not torch.float32"),
        ({"dim": 40}, "know head dimensions (32, 64, 72), not 40"),
        ({"scale": -1.0}, "take positive scales, not -1.0"),
        ({"gamma": WANTED}, None),
        ({"norm": (WANTED, None, 1e-5)}, None),
        ({"norm": (None, DOUBLE, 1e-5)}, "float64"),
        ({"gamma": DOUBLE}, "float64"),
        ({"norm_dtype": torch.float64}, "float64"),
        ({"x": torch.zeros(1, 9, 16, dtype=torch.bfloat16).as_subclass(Watched)}, "the tokens are a Watched"),
        ({"x": torch.zeros(1, 9, 16, dtype=torch.float16)}, "add no torch.bfloat16 to torch.float16"),
        ({"x": torch.zeros(1, 9, 16)}, None),
    ],
    ids=str,
)
@pytest.mark.usefixtures("chosen")
def test_what_the_attention_half_declines(form: str, change: dict[str, Any], reason: str | None) -> None:
    told = tome_cuda.why_not("attend_half", *attend(form=form, **change))
    assert told is reason or reason in str(told)


@pytest.mark.parametrize(("form", "reason"), [("gaps", "gaps"), ("gaps in packed", "gaps"), ("empty", "no keys")])
@pytest.mark.usefixtures("chosen")
def test_what_layouts_the_attention_half_declines(form: str, reason: str) -> None:
    change = {"x": torch.zeros(1, 0, 16, dtype=torch.bfloat16), "tokens": 0} if form == "empty" else {}
    assert reason in str(tome_cuda.why_not("attend_half", *attend(form=form, **change)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, None),
        ({"gamma": WANTED}, None),
        ({"gamma": DOUBLE}, "float64"),
        ({"norm": (DOUBLE, None, 1e-5)}, "float64"),
        ({"x": torch.zeros(1, 9, 16).as_subclass(Watched)}, "the tokens are a Watched"),
        ({"x": torch.zeros(1, 9, 16, dtype=torch.float16)}, "add no torch.bfloat16 to torch.float16"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("chosen")
def test_what_the_mlp_half_declines(change: dict[str, Any], reason: str | None) -> None:
    told = tome_cuda.why_not("mlp_half", *mlp(**change))
    assert told is reason or reason in str(told)


@pytest.mark.usefixtures("chosen")
def test_halves_without_gradients_and_under_who_watches() -> None:
    names = {"attend_half": attend(gamma=WANTED), "mlp_half": mlp(gamma=WANTED)}
    for name, args in names.items():
        with torch.no_grad():
            assert tome_cuda.why_not(name, *args) is None
            with torch.device("cpu"):
                assert "a mode of torch" in str(tome_cuda.why_not(name, *args))
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert "a mode of torch" in str(tome_cuda.why_not(name, *args))
    torch._dynamo.reset()
    told = torch.compile(lambda x: tome_cuda.why_not("mlp_half", x, *mlp()[1:]), backend="eager", fullgraph=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert told(mlp()[0]) is None


@pytest.mark.usefixtures("chosen")
def test_autocast_decides_what_linear_layers_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 model under autocast is one for the kernels; a float16 stream beside bfloat16 branches is none."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert tome_cuda.why_not("attend_half", *attend(dtype=torch.float32, form="projected")) is None
    assert "not torch.float32" in str(tome_cuda.why_not("attend_half", *attend(dtype=torch.float32)))
    assert "add no torch.bfloat16" in str(tome_cuda.why_not("attend_half", *attend(dtype=torch.float16)))
    assert tome_cuda.why_not("mlp_half", *mlp(dtype=torch.float32)) is None
    assert "add no torch.bfloat16" in str(tome_cuda.why_not("mlp_half", *mlp(dtype=torch.float16)))


@pytest.mark.usefixtures("chosen")
def test_a_half_is_one_call_or_its_reason_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad(), recording.recorded() as calls:
        call = tome.ops.one_call("mlp_half", *mlp())
        assert call is not None
        assert all(map(torch.equal, tome.ops.take(call, *mlp()), tome_reference.mlp_half(*mlp())))
        assert tome.ops.one_call("attend_half", *attend(dim=40)) is None
        with tome.use_backend("reference"):
            assert tome.ops.one_call("mlp_half", *mlp()) is None
        with monkeypatch.context() as patch:
            patch.setattr(predicates, "without_product", lambda *args: None)
            assert tome.ops.one_call("mlp_half", *mlp(gelu="erf")) is not None
        assert tome.ops.one_call("mlp_half", *mlp(gelu="erf")) is not None
    apart = "one call without a product with GELU inside"
    hopper = "the kernel of linear_gelu is for GPUs of compute capability 9.0"
    reason = "the kernels of attention know head dimensions (32, 64, 72), not 40"
    assert calls == [
        ("mlp_half", "cuda", f"{apart}: {hopper}"),
        ("attend_half", None, reason),
        ("mlp_half", None, "the reference was chosen"),
        ("mlp_half", "cuda", "one call with GELU inside its product where it pays"),
        ("mlp_half", "cuda", f"{apart}: {hopper}"),
    ]


def test_who_computes_attention_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    q, size = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16, requires_grad=True), torch.ones(1, 4)
    with recording.recorded() as calls:
        tome.ops.attention(q, q, q, size)
        stand_in.choose(monkeypatch)
        tome.ops.attention(q, q, q, size=size)
        tome.ops.attention(q, q, q, size, dropout_p=0.5)
    assert [(call.backend, call.reason) for call in calls] == [
        ("reference", "the tokens are not on a GPU"),
        ("cuda", None),
        ("cuda", "by torch: the kernels of attention drop no weights"),
    ]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with the library, a GPU of compute capability 9.0 and a driver for it, to take things away from."""
    told = stand_in.INFO._replace(archs=("90a-real", "80-virtual"))
    monkeypatch.setattr(library, "_load", lambda: library._Loaded(told, None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(library, "_driver_version", lambda: (13, 0))
    library._unsupported_device.cache_clear()
    yield monkeypatch
    library._unsupported_device.cache_clear()


def test_nothing_stands_in_the_way_of_a_whole_machine(machine: pytest.MonkeyPatch) -> None:
    assert tome_cuda.unavailable() is None


def test_one_gpu_of_several_is_enough(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    machine.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0))[index])
    assert tome_cuda.unavailable() is None
    assert "not for Some GPU (7.5)" in str(library.unsupported_device(0))


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason", "fix"),
    [
        (torch.version, "cuda", None, "built without CUDA", "pytorch.org"),
        (torch.cuda, "is_available", lambda: False, "can use no GPU", "CUDA_VISIBLE_DEVICES"),
        (torch.cuda, "device_count", lambda: 0, "can use no GPU", "CUDA_VISIBLE_DEVICES"),
        (library, "_driver_version", lambda: (12, 8), "the driver supports CUDA 12.8", "update the driver"),
        (
            torch.cuda,
            "get_device_capability",
            lambda index: (7, 5),
            "not for Some GPU (7.5)",
            "TOME_CUDA_ARCHS=75-real",
        ),
    ],
)
def test_what_a_machine_lacks_is_told(
    machine: pytest.MonkeyPatch, owner: object, name: str, value: object, reason: str, fix: str
) -> None:
    machine.setattr(owner, name, value)
    told = str(tome_cuda.unavailable())
    assert reason in told
    assert ". Fix: " in told
    assert fix in told.split(". Fix: ")[1]


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for once more, and again after the test."""
    library._load.cache_clear()
    yield
    library._load.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_missing_library_gives_the_reason_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", lambda: None)
    told = "not built. Fix: TOME_BUILD_CUDA=1 "
    assert told in str(tome_cuda.unavailable())
    assert tome_cuda.build_info() == {}
    with pytest.raises(tome_cuda.LibraryError, match=told):
        library.info()


@pytest.mark.usefixtures("fresh")
def test_a_broken_library_gives_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_kernels.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "find", lambda: broken)
    assert "cannot be loaded" in str(tome_cuda.unavailable())
    assert tome_cuda.build_info() == {}


@pytest.mark.usefixtures("fresh")
def test_an_old_torch_gives_a_reason_and_loads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "find", lambda: tmp_path / "never opened")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    assert "need torch >= 2.11, this is 2.10.0+cu128" in str(tome_cuda.unavailable())


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_version_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe() -> bytes:
        return b'{"torch": "2.11", "cuda": "13.2", "cutlass": "4.2.0", "archs": "90a-real"}'

    monkeypatch.setattr(library, "find", lambda: Path("old.so"))
    monkeypatch.setattr(library.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(tome_cuda_build_info=describe))
    assert "old.so are of another version (they tell no 'head_dims'). Fix: TOME_BUILD" in str(tome_cuda.unavailable())
