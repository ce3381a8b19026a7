"""What is named as in torch means what it does there: signatures, values, gradients, and a whole program."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import nn, optim

torch = pytest.importorskip("torch", reason="needs the interop-test extra")

PROGRAM = Path(__file__).parents[2] / "examples" / "09_written_for_torch.py"
LEARNERS = Path(__file__).parent / "written_for_torch"
IMPORTS = {
    "import tinyllm as torch\n": "import torch\n",
    "from tinyllm import nn\n": "from torch import nn\n",
    "from tinyllm.nn import functional as F\n": "from torch.nn import functional as F\n",
}


def program(library: str, path: Path = PROGRAM) -> dict[str, Any]:
    """The names that the program defines, run under `library`."""
    text = path.read_text(encoding="utf-8")
    if library == "torch":
        for ours, theirs in IMPORTS.items():
            text = text.replace(ours, theirs)
        assert "tinyllm" not in text
    names: dict[str, Any] = {"__name__": f"written_for_{library}"}
    exec(compile(text, str(path), "exec"), names)
    return names


def copy_weights(ours: Any, theirs: Any) -> None:
    """Torch's model gets our weights, by name: both have the same names."""
    state = {name: torch.tensor(np.array(array)) for name, array in ours.state_dict().items()}
    theirs.load_state_dict(state)


def test_one_program_has_the_same_losses_under_both() -> None:
    here, there = program("tinyllm"), program("torch")
    tinyllm.manual_seed(3)
    V, tokens = 13, np.random.default_rng(5).integers(0, 13, (6, 17))
    ours, theirs = here["LanguageModel"](V), there["LanguageModel"](V)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    copy_weights(ours, theirs)
    found = here["train"](ours, tinyllm.tensor(tokens), 20)
    expected = there["train"](theirs, torch.tensor(tokens), 20)
    assert expected[-1] < 0.7 * expected[0], "the model learns, so that each step counts"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    ids = tokens[:1, :6]
    both = [
        side["continued"](model, library.tensor(ids), 12).numpy()
        for side, model, library in ((here, ours, tinyllm), (there, theirs, torch))
    ]
    assert both[0].shape == (1, 18)
    assert np.array_equal(*both)


MODELS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "GPT": ("gpt", lambda names: names["GPT"]()),
    "GPT with fused attention": ("gpt", lambda names: names["GPT"](flash=True)),
    "encoder": ("encoder", lambda names: names["Encoder"]()),
    "classifier": ("classifier", lambda names: names["Classifier"]()),
    "regression": ("regression", lambda names: None),
}


@pytest.mark.parametrize(("name", "build"), MODELS.values(), ids=MODELS.keys())
def test_what_learners_write_runs_with_the_imports_changed(name: str, build: Callable[[Any], Any]) -> None:
    """Losses, accuracies and greedy text: the programs say what is compared."""
    data = np.random.default_rng(5).integers(0, 11, (24, 17))
    here, there = (program(library, LEARNERS / f"{name}.py") for library in ("tinyllm", "torch"))
    tinyllm.manual_seed(3)
    ours, theirs = build(here), build(there)
    if ours is not None:
        state = {key: torch.tensor(np.array(array)) for key, array in ours.state_dict().items()}
        passed_over = theirs.load_state_dict(state, strict=False)
        assert set(passed_over.missing_keys) <= {"transformer.wte.weight"}, (
            "which is tied, and listed once here"
        )
        assert not passed_over.unexpected_keys
    found = here["train"](ours, tinyllm.tensor(data), 20)
    expected = there["train"](theirs, torch.tensor(data), 20)
    assert expected[19] < 0.9 * expected[1], "it learns, so that each step counts"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_model_is_shown_as_by_torch() -> None:
    shown = repr(program("torch")["LanguageModel"](5))
    plain = shown.replace("NonDynamicallyQuantizableLinear", "Linear")
    assert repr(program("tinyllm")["LanguageModel"](5)) == plain


# ---- Signatures --------------------------------------------------------------------------------

SHARED = [
    *(
        (getattr(nn, name), getattr(torch.nn, name))
        for name in (
            "CrossEntropyLoss", "Dropout", "Embedding", "GELU", "Identity", "LayerNorm", "Linear", "MSELoss",
            "ModuleDict", "ModuleList", "MultiheadAttention", "Parameter", "RMSNorm", "ReLU", "Sequential", "SiLU",
            "Sigmoid", "Softmax", "Tanh",
        )
    ),
    *((getattr(optim, name), getattr(torch.optim, name)) for name in ("AdamW", "Adam", "SGD", "Muon")),
    (optim.lr_scheduler.LambdaLR, torch.optim.lr_scheduler.LambdaLR),
    *(
        (getattr(nn.functional, name), getattr(torch.nn.functional, name))
        for name in (
            "cross_entropy", "dropout", "embedding", "layer_norm", "mse_loss", "relu", "rms_norm", "silu", "softmax",
            "log_softmax",
        )
    ),
    *(
        (getattr(nn.utils, name), getattr(torch.nn.utils, name))
        for name in ("clip_grad_norm_", "clip_grad_value_")
    ),
    *(
        (getattr(nn.init, name), getattr(torch.nn.init, name))
        for name in ("normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "ones_", "zeros_", "constant_")
    ),
    *(
        (getattr(nn.Module, name), getattr(torch.nn.Module, name))
        for name in (
            "apply", "buffers", "children", "eval", "modules", "named_children", "parameters", "register_buffer",
            "requires_grad_", "train", "zero_grad", "named_modules", "named_parameters", "load_state_dict",
            "extra_repr",
        )
    ),
    *(
        (getattr(optim.Optimizer, name), getattr(torch.optim.Optimizer, name))
        for name in ("zero_grad", "add_param_group", "state_dict", "load_state_dict")
    ),
]  # fmt: skip
REQUIRED_HERE = {"dim"}
"""Which torch guesses, with a warning."""
RENAMED = {"data": "values", "args": "modules", "params": "params"}


@pytest.mark.parametrize(("ours", "theirs"), SHARED, ids=lambda x: getattr(x, "__qualname__", None))
def test_positions_names_and_defaults_are_those_of_torch(ours: Any, theirs: Any) -> None:
    """Every argument that can be given by position here stands at that place in torch, with that name and default."""
    found, expected = (
        [p for p in inspect.signature(f).parameters.values() if p.name not in ("self", "inplace")]
        for f in (ours, theirs)
    )
    known = {p.name: p for p in expected}
    positional = [p for p in found if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    for one, other in zip(positional, expected, strict=False):
        if one.kind is inspect.Parameter.VAR_POSITIONAL:
            break
        assert one.name == RENAMED.get(other.name, other.name)
    for one in found:
        other = known.get(one.name)
        if other is None or one.name in REQUIRED_HERE or one.name in ("data", "modules"):
            continue
        assert one.default == other.default or {one.default, other.default} <= {(), None}


# ---- Initial weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda nn: nn.Linear(300, 200), "weight"),
        (lambda nn: nn.Linear(9, 30_000), "bias"),
        (lambda nn: nn.Embedding(300, 200), "weight"),
        (lambda nn: nn.MultiheadAttention(150, 3), "in_proj_weight"),
        (lambda nn: nn.MultiheadAttention(150, 3), "out_proj.weight"),
        (lambda nn: nn.MultiheadAttention(150, 3), "out_proj.bias"),
        (lambda nn: nn.LayerNorm(20), "weight"),
    ],
)
def test_weights_begin_as_in_torch(build: Callable[[Any], Any], name: str) -> None:
    """In distribution: the deviation and the largest of tens of thousands of numbers."""
    ours = build(nn).state_dict()[name].astype(np.float64)
    theirs = build(torch.nn).state_dict()[name].double().numpy()
    assert ours.shape == theirs.shape
    n = ours.size
    assert abs(ours.mean() - theirs.mean()) <= 6 * theirs.std() / math.sqrt(n)
    assert abs(ours.std() - theirs.std()) <= 6 * theirs.std() / math.sqrt(n)
    is_normal = build is not None and np.abs(theirs).max() > 3 * theirs.std() > 0
    if not is_normal:
        np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=1e-3)


@pytest.mark.parametrize(
    "fill",
    [
        lambda init, w: init.normal_(w, 0.5, 0.02),
        lambda init, w: init.uniform_(w, -1, 3),
        lambda init, w: init.xavier_normal_(w, 2.0),
        lambda init, w: init.xavier_uniform_(w),
        lambda init, w: init.constant_(w, 3),
        lambda init, w: init.ones_(w),
        lambda init, w: init.zeros_(w),
    ],
)
def test_init_fills_in_place_as_torch(fill: Callable[[Any, Any], Any]) -> None:
    ours, theirs = (library.nn.Linear(300, 200).weight for library in (tinyllm, torch))
    array = ours.data
    assert fill(nn.init, ours) is ours
    fill(torch.nn.init, theirs)
    expected = theirs.detach().double().numpy()
    assert ours.data is array
    assert abs(array.mean() - expected.mean()) <= 6 * expected.std() / 200
    assert abs(array.std() - expected.std()) <= 6 * expected.std() / 200


def test_multinomial_draws_by_weight() -> None:
    tinyllm.manual_seed(0)
    weights = np.array([[1.0, 0.0, 3.0], [0.0, 0.0, 2.0]])
    drawn = tinyllm.multinomial(tinyllm.tensor(weights), 4000, replacement=True)
    assert drawn.shape == (2, 4000)
    counts = [np.bincount(row, minlength=3) / 4000 for row in drawn.data]
    np.testing.assert_allclose(
        counts, weights / weights.sum(1, keepdims=True), atol=6 * 0.5 / math.sqrt(4000)
    )
    assert sorted(tinyllm.multinomial(tinyllm.ones(5), 5).data) == [0, 1, 2, 3, 4]
    for bad in ([0.0, 0.0], [1.0, -1.0], [math.nan, 1.0]):
        for library, error in ((tinyllm, ValueError), (torch, RuntimeError)):
            with pytest.raises(error):
                library.multinomial(library.tensor(bad), 1)


# ---- Values and gradients ----------------------------------------------------------------------


def x64(library: Any, *arrays: Any) -> list[Any]:
    """Leaves of the arrays, in float64."""
    return [library.tensor(np.array(a, dtype=np.float64), requires_grad=True) for a in arrays]


def array_of(value: Any) -> Any:
    return None if value is None else np.array(value.detach().numpy() if hasattr(value, "detach") else value)


MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "boolean": {"attn_mask": np.triu(np.ones((4, 5), dtype=bool), 2)},
    "additive": {"attn_mask": np.random.default_rng(0).normal(size=(4, 5))},
    "infinite": {"attn_mask": np.where(np.triu(np.ones((4, 5)), 1) > 0, -np.inf, 0.0), "is_causal": True},
    "of each head": {"attn_mask": np.random.default_rng(1).random((6, 4, 5)) < 0.3},
    "padding": {"key_padding_mask": np.array([[False] * 3 + [True] * 2, [False] * 5])},
    "both": {
        "attn_mask": np.triu(np.ones((4, 5), dtype=bool), 2),
        "key_padding_mask": np.array([[False] * 4 + [True], [False] * 3 + [True] * 2]),
    },
    "heads apart": {"average_attn_weights": False},
    "without weights": {"need_weights": False},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "without a batch"])
@pytest.mark.parametrize("bias", [False, True])
def test_multihead_attention_is_torchs(
    masks: dict[str, Any], batch_first: bool, kind: str, bias: bool
) -> None:
    rng = np.random.default_rng(7)
    B, T, S, D, H = 2, 4, 5, 6, 3
    if kind == "self":
        T = S
        masks = {k: v[..., [0, 1, 2, 3, 3], :] if k == "attn_mask" else v for k, v in masks.items()}
    q, kv = rng.normal(size=(B, T, D)), rng.normal(size=(2, B, S, D))
    if kind == "without a batch":
        q, kv = q[0], kv[:, 0]
        masks = {k: v[0] if k == "key_padding_mask" else v for k, v in masks.items()}
        masks = {k: v[:3] if k == "attn_mask" and v.ndim == 3 else v for k, v in masks.items()}
    elif not batch_first:
        q, kv = q.swapaxes(0, 1), kv.swapaxes(1, 2)
    cotangent = rng.normal(size=q.shape)
    weights_cotangent = rng.normal(size=(1,))
    tinyllm.manual_seed(2)
    ours = nn.MultiheadAttention(D, H, bias=bias, batch_first=batch_first).double()
    theirs = torch.nn.MultiheadAttention(D, H, bias=bias, batch_first=batch_first).double()
    for parameter in ours.parameters():
        parameter.data = rng.normal(size=parameter.shape)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    copy_weights(ours, theirs)

    def run(library: Any, module: Any) -> list[Any]:
        x, *rest = x64(library, q, *kv)
        inputs = [x, x, x] if kind == "self" else [x, *rest]
        taken = {k: library.tensor(v) if isinstance(v, np.ndarray) else v for k, v in masks.items()}
        output, weights = module(*inputs, **taken)
        loss = (output * library.tensor(cotangent)).sum()
        if weights is not None:
            loss = loss + (weights**2 * library.tensor(weights_cotangent)).sum()
        loss.backward()
        named = dict(module.named_parameters())
        return [
            output,
            weights,
            *(v.grad for v in ([x] if kind == "self" else inputs)),
            *(named[n].grad for n in sorted(named)),
        ]

    for found, expected in zip(run(tinyllm, ours), run(torch, theirs), strict=True):
        if expected is None:
            assert found is None
        else:
            np.testing.assert_allclose(array_of(found), array_of(expected), rtol=1e-10, atol=1e-12)


F_CASES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "relu": lambda t, F, x: F.relu(x),
    "silu": lambda t, F, x: F.silu(x),
    "gelu": lambda t, F, x: F.gelu(x),
    "gelu tanh": lambda t, F, x: F.gelu(x, approximate="tanh"),
    "softmax": lambda t, F, x: F.softmax(x, dim=1),
    "log_softmax": lambda t, F, x: F.log_softmax(x, dim=0),
    "sigmoid": lambda t, F, x: F.sigmoid(x),
    "tanh": lambda t, F, x: F.tanh(x),
    "linear": lambda t, F, x: F.linear(x, x[0], None),
    "layer_norm": lambda t, F, x: F.layer_norm(x, (4,)),
    "layer_norm with weights": lambda t, F, x: F.layer_norm(x, (4,), x[0, 0], x[1, 2], 0.1),
    "rms_norm": lambda t, F, x: F.rms_norm(x, (4,)),
    "rms_norm with a weight": lambda t, F, x: F.rms_norm(x, (4,), x[0, 1]),
    "dropout off": lambda t, F, x: F.dropout(x, 0.5, training=False),
    "dropout of everything": lambda t, F, x: F.dropout(x, 1.0),
    "mse_loss": lambda t, F, x: F.mse_loss(x, x.detach() * 2 + 1),
    "mse_loss sum": lambda t, F, x: F.mse_loss(x, x.detach() * 2 + 1, reduction="sum"),
    "cross_entropy": lambda t, F, x: F.cross_entropy(x[0], t.tensor([1, 0, 3])),
    "cross_entropy with classes second": lambda t, F, x: F.cross_entropy(
        x, t.tensor([[1, 0, 2, 2], [0, -100, 1, 2]])
    ),
    "cross_entropy of pictures": lambda t, F, x: F.cross_entropy(
        x[:, :, None] ** t.tensor([[1.0], [2.0]], dtype=t.float64),
        t.tensor([[[1, 0, 2, 2], [0, 1, 1, 0]], [[0, 1, 2, 1], [2, 2, 0, 1]]]),
    ),
    "CrossEntropyLoss": lambda t, F, x: t.nn.CrossEntropyLoss(ignore_index=2, reduction="none")(
        x[0], t.tensor([1, 2, 3])
    ),
    "cross_entropy smoothed and weighted": lambda t, F, x: F.cross_entropy(
        x, t.tensor([[1, 0, 2, 2], [0, -100, 1, 2]]), x.detach()[0, :, 0] ** 2, label_smoothing=0.2
    ),
    "cross_entropy of probabilities": lambda t, F, x: F.cross_entropy(x, F.softmax(x.detach() * 2, dim=1)),
    "CrossEntropyLoss smoothed and weighted": lambda t, F, x: t.nn.CrossEntropyLoss(
        x.detach()[0, 0] ** 2, label_smoothing=0.1, reduction="sum"
    )(x[0], t.tensor([1, 2, 3])),
    "MSELoss": lambda t, F, x: t.nn.MSELoss(reduction="sum")(x, x.detach() * 2),
    "activations": lambda t, F, x: t.nn.Sequential(
        t.nn.SiLU(),
        t.nn.GELU("tanh"),
        t.nn.Tanh(),
        t.nn.Sigmoid(),
        t.nn.Softmax(dim=0),
        t.nn.Identity(3, a=1),
    )(x),
    "cross_entropy of one": lambda t, F, x: F.cross_entropy(x[0, 0], t.tensor(2), reduction="none"),
    "cross_entropy ignoring": lambda t, F, x: F.cross_entropy(
        x[0], t.tensor([1, 9, 3]), ignore_index=9, reduction="sum"
    ),
    "embedding": lambda t, F, x: F.embedding(t.tensor([[2, 0], [1, 1]]), x[0], padding_idx=1),
    "one_hot": lambda t, F, x: F.one_hot(t.tensor([2, 0]), 5),
    "attention": lambda t, F, x: F.scaled_dot_product_attention(x, x, x * 2),
    "causal attention to more keys": lambda t, F, x: F.scaled_dot_product_attention(
        x[:, :2], x, x, is_causal=True
    ),
    "attention with a mask": lambda t, F, x: F.scaled_dot_product_attention(
        x, x, x, t.tensor(np.tri(3, dtype=bool))
    ),
    "attention of heads": lambda t, F, x: F.scaled_dot_product_attention(
        x[None], x[None], x[None] * 2, scale=0.3
    ),
    "causal attention of heads to more keys": lambda t, F, x: F.scaled_dot_product_attention(
        x[None, :, :2], x[None], x[None], is_causal=True
    ),
    "attention of heads with a mask": lambda t, F, x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], t.tensor(np.tri(3, k=1, dtype=bool))
    ),
    "attention with an additive mask": lambda t, F, x: F.scaled_dot_product_attention(
        x, x, x, x[..., :3], scale=0.3
    ),
}


@pytest.mark.parametrize("case", F_CASES.values(), ids=F_CASES.keys())
def test_functional_is_torchs(case: Callable[[Any, Any, Any], Any]) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(2, 3, 4))

    def run(library: Any) -> tuple[Any, Any]:
        (x,) = x64(library, values)
        y = case(library, library.nn.functional, x)
        if y.requires_grad:
            cotangent = np.random.default_rng(5).normal(size=tuple(y.shape))
            y.backward(library.tensor(cotangent))
        return array_of(y), array_of(x.grad)

    (found, gradient), (expected, expected_gradient) = run(tinyllm), run(torch)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    if expected_gradient is not None:
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-13)


# ---- Modules -----------------------------------------------------------------------------------


def tree(nn: Any, library: Any) -> Any:
    """A module with containers in containers, a shared part, a buffer, and one that is not saved."""

    class Part(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(library.ones(2))
            self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Sequential(nn.Linear(3, 2, bias=False)))
            self.register_buffer("mean", library.zeros(2))
            self.register_buffer("scratch", library.ones(1), persistent=False)
            self.register_buffer("nothing", None)

    class Whole(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Part(), nn.Identity()])
            self.parts.append(Part())
            self.parts.insert(1, nn.ReLU())
            self.heads = nn.ModuleDict({"a": nn.Linear(2, 4), "b": nn.Embedding(3, 2, padding_idx=0)})
            self.heads["c"] = nn.Dropout(0.25)
            assert self.heads.c is self.heads["c"]
            self.again = self.heads["a"]
            self.norms = nn.ModuleList(
                [nn.LayerNorm(4, bias=False), nn.RMSNorm(4), nn.GELU(), nn.Softmax(dim=1)]
            )
            self.tied = nn.Linear(2, 4)
            self.tied.weight = self.heads["a"].weight

    return Whole()


def test_modules_are_walked_as_in_torch() -> None:
    ours, theirs = tree(nn, tinyllm), tree(torch.nn, torch)
    for walk in (
        lambda m: [name for name, _ in m.named_modules()],
        lambda m: [type(x).__name__ for x in m.modules()],
        lambda m: [name for name, _ in m.named_children()],
        lambda m: [type(x).__name__ for x in m.children()],
        lambda m: [(name, tuple(p.shape)) for name, p in m.named_parameters()],
        lambda m: [name for name, _ in m.named_parameters(prefix="x", recurse=True)],
        lambda m: [name for name, _ in m.parts[0].named_parameters(recurse=False)],
        lambda m: [(name, tuple(b.shape)) for name, b in m.named_buffers()],
        lambda m: [len(m.parts), len(m.heads), len(m.norms[1:]), list(m.heads), "a" in m.heads],
        lambda m: [name for name, _ in m.parts[0].net[1:].named_parameters()],
        lambda m: [x.training for x in m.eval().modules()] + [x.training for x in m.train().modules()],
        lambda m: [p.requires_grad for p in m.parts.requires_grad_(False) and m.parameters()],
    ):
        assert walk(ours) == walk(theirs)
    orders: list[list[str]] = [[], []]
    for model, order in zip((ours, theirs), orders, strict=True):
        assert model.apply(lambda m, order=order: order.append(type(m).__name__)) is model
    assert orders[0] == orders[1]
    assert repr(ours) == repr(theirs)


def test_states_go_over_by_name_tied_ones_included() -> None:
    ours, theirs = tree(nn, tinyllm), tree(torch.nn, torch)
    state = theirs.state_dict()
    assert (
        repr(ours.load_state_dict({k: v.numpy() for k, v in state.items()}))
        == "<All keys matched successfully>"
    )
    mine = ours.state_dict()
    # A parameter that is reached twice is listed once here.
    assert set(state) - set(mine) == {"again.weight", "again.bias", "tied.weight"}
    for name, array in mine.items():
        assert np.array_equal(array, state[name].numpy())
    other = {**{k: v.numpy() for k, v in state.items()}, "tied.weight": np.ones((4, 2), dtype=np.float32)}
    with pytest.raises(tinyllm.InputError, match="are one parameter here, and their arrays differ"):
        ours.load_state_dict(other)
    del mine["heads.a.bias"]
    passed_over = ours.load_state_dict({**mine, "x": np.ones(1)}, strict=False)
    assert passed_over == (["heads.a.bias"], ["x"])


# ---- Optimizers and clipping -------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any, Any], Any]] = {
    "AdamW": lambda o, p: o.AdamW(p, lr=0.02),
    "AdamW with all": lambda o, p: o.AdamW(p, 0.02, (0.8, 0.95), 1e-3, 0.3),
    "Adam": lambda o, p: o.Adam(p, lr=0.02, weight_decay=0.2),
    "SGD": lambda o, p: o.SGD(p, lr=0.05),
    "SGD with momentum": lambda o, p: o.SGD(p, 0.05, 0.9, 0.0, 0.1),
    "SGD dampened": lambda o, p: o.SGD(p, lr=0.05, momentum=0.7, dampening=0.4),
    "SGD nesterov": lambda o, p: o.SGD(p, lr=0.05, momentum=0.8, weight_decay=0.1, nesterov=True),
    "groups": lambda o, p: o.AdamW(
        [{"params": p[:1], "lr": 0.1, "weight_decay": 0.0}, {"params": p[1:]}], lr=0.01, betas=(0.7, 0.9)
    ),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers_step_as_torchs(build: Callable[[Any, Any], Any]) -> None:
    """Twelve steps with a schedule, a rate changed by hand, and a parameter that has no gradient in some of them."""
    start = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate([(3, 4), (4,), (2, 2)])]

    def run(library: Any) -> list[Any]:
        parameters = [library.nn.Parameter(library.tensor(a.copy())) for a in start]
        optimizer = build(library.optim, parameters)
        schedule = library.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        rng = np.random.default_rng(9)
        for step in range(12):
            optimizer.zero_grad()
            drawn = [library.tensor(rng.normal(size=a.shape)) for a in start]
            used = [i for i in range(3) if i != 2 or step in (2, 3, 7)]
            total = sum((parameters[i] ** 3 + parameters[i] * drawn[i]).sum() for i in used)
            total.backward()
            optimizer.step()
            schedule.step()
            if step == 6:
                for group in optimizer.param_groups:
                    group["weight_decay"] = 0.05
        assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        return [array_of(p) for p in parameters] + [schedule.get_last_lr()]

    for found, expected in zip(run(tinyllm), run(torch), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def test_muon_steps_as_torchs_to_the_rounding_of_bfloat16() -> None:
    """Torch orthogonalises in bfloat16: each of five iterations of three products rounds to 2^-9."""
    start = np.random.default_rng(0).normal(size=(6, 3))
    ends = []
    for library in (tinyllm, torch):
        weight = library.nn.Parameter(library.tensor(start.copy()))
        optimizer = library.optim.Muon([weight], lr=0.1)
        rng = np.random.default_rng(1)
        for _ in range(4):
            optimizer.zero_grad()
            (weight * library.tensor(rng.normal(size=start.shape))).sum().backward()
            optimizer.step()
        ends.append(array_of(weight))
    assert np.abs(ends[1] - start).max() > 0.2
    np.testing.assert_allclose(ends[0], ends[1], atol=4 * 0.1 * math.sqrt(2) * 15 * 2**-9)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_gradients_are_clipped_as_by_torch(norm_type: float, max_norm: float) -> None:
    arrays = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate([(3, 4), (5,), ()])]
    results = []
    for library in (tinyllm, torch):
        parameters = [library.nn.Parameter(library.tensor(np.zeros_like(a))) for a in arrays]
        for parameter, a in zip(parameters[:2], arrays, strict=False):
            (parameter * library.tensor(a)).sum().backward()
        norm = library.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        assert parameters[2].grad is None
        results.append([norm.item(), *(array_of(p.grad) for p in parameters[:2])])
        library.nn.utils.clip_grad_norm_(parameters[0], 0.01)  # a single one
        results[-1].append(array_of(parameters[0].grad))
        library.nn.utils.clip_grad_value_(parameters, 1e-3)
        results[-1].append(array_of(parameters[0].grad))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_torchs(bad: float) -> None:
    results = []
    for library in (tinyllm, torch):
        parameter = library.nn.Parameter(library.ones(3))
        (parameter * library.tensor([1.0, bad, 2.0])).sum().backward()
        with pytest.raises(RuntimeError):
            library.nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
        results.append([library.nn.utils.clip_grad_norm_([parameter], 1.0).item(), *array_of(parameter.grad)])
    np.testing.assert_array_equal(*results)
