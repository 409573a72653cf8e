"""The survey of all models: a name of each kind here, all of them in ``nox -s survey``."""

import pytest
import survey
import timm
import torch

import tome
from tome.patch import refusals, timm_host

ISOTROPIC = {
    *("Beit", "Cait", "DeepseekVitClassifier", "DeepseekVitEncoder", "Eva", "Gemma4VitClassifier", "Gemma4VitEncoder"),
    *("NaFlexVit", "Qwen3VitClassifier", "Qwen3VitEncoder", "VisionTransformer", "VisionTransformerDistilled"),
    "VisionTransformerRelPos",
}


@pytest.fixture(scope="module")
def entries():
    return survey.timm_entries()


def of(entries, name):
    return next(entry for entry in entries if entry.name == name)


def stored(entries):
    """The lines of docs/hosts.md on this timm; older ones cannot make all that they name, or not in float64."""
    lines, version = survey.read(survey.PAGE.read_text()), entries[0].library
    if {line.library for line in lines if line.library.startswith("timm ")} != {version}:
        pytest.skip(f"docs/hosts.md is not about {version}")
    return [line for line in lines if line.library == version]


def is_small(entry):
    return getattr(entry.make, "func", None) is survey._small


def test_every_name_is_asked(entries):
    assert [entry.name for entry in entries] == timm.list_models()
    assert sum(entry.weights for entry in entries) == len(timm.list_pretrained())
    known = {entry.family for entry in entries if is_small(entry)}
    assert known <= ISOTROPIC
    assert {entry.name for entry in entries if is_small(entry)} >= {"vit_tiny_patch16_224", "beit_base_patch16_224"}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm
def test_one_of_each_kind_is_supported(entries):
    assert stored(entries)
    kinds = {(entry.family, entry.variant): entry for entry in reversed(entries) if is_small(entry)}
    assert len(kinds) >= 8
    refused = {entry.name: reason for entry in kinds.values() if (reason := survey.outcome(entry)) is not None}
    assert refused == {}


def test_what_has_no_sequence_of_tokens_is_refused_with_a_reason_of_its_own(entries):
    others = {entry.family: entry for entry in entries if not is_small(entry) and entry.family not in ISOTROPIC}
    reasons = {family: survey.outcome(entry) for family, entry in others.items()}
    assert set(reasons.values()) <= set(refusals.KINDS)
    assert len(reasons) > 70
    assert reasons["SwinTransformer"].startswith("its attention looks at windows")


def test_reasons_are_those_of_classes_that_are_refused(entries):
    assert len(refusals.REASONS) == sum(len(names.split()) for names in refusals.KINDS.values())
    assert not refusals.REASONS.keys() & (ISOTROPIC | set(timm_host.known_models()))


def test_subclasses_have_the_reason_of_what_they_are_derived_from():
    kind = type("Mine", (timm.models.SwinTransformer,), {})
    assert refusals.reason(kind) == refusals.REASONS["SwinTransformer"]
    assert refusals.reason(type("SwinTransformer", (torch.nn.Module,), {})) is None
    with pytest.raises(tome.UnsupportedModelError, match="Mine is not supported: its attention looks at windows"):
        tome.patch.timm(survey._bare(kind))


def ignored_places(bias, place, log_size, dtype):
    tokens = bias.shape[-1] if place.home is None else place.home.shape[1]
    bias = bias[..., :tokens, :tokens]
    return (bias if log_size is None else bias + log_size).to(dtype)


def half(x, branch, *others):
    return tome.tokens.add(x, tome.tokens.Branch(branch.value / 2), *others)


@pytest.mark.parametrize(
    ("name", "where", "wrong"),
    [
        ("beit_base_patch16_224", "tome.patch.timm_bias.paired", ignored_places),
        ("vit_relpos_base_patch16_224", "tome.patch.timm_bias.size_bias", lambda size: size[:, None, None] * 0),
        ("vit_pwee_patch16_reg1_gap_256", "tome.tokens.Tokens.weights", lambda self, by_size: None),
        ("vit_base_patch16_18x2_224", "tome.patch.timm_parallel.add", half),
        ("cait_xxs24_224", "tome.patch.timm_cait.size_bias", lambda size: size[:, None, None]),
        ("vit_tiny_patch16_224", "tome.schedule.merged", lambda entry, free: 3),
        ("vit_tiny_patch16_224", "tome.patch.plain.scaled", lambda block, value, *_: tome.tokens.Branch(value * 1.01)),
    ],
)
def test_what_is_wrong_is_neither_supported_nor_refused(entries, monkeypatch, name, where, wrong):
    entry = of(entries, name)
    monkeypatch.setattr(survey, "R", 10)  # so many that merged tokens merge again
    assert survey.outcome(entry) is None
    monkeypatch.setattr(where, wrong)
    with pytest.raises(AssertionError):
        survey.outcome(entry)


def test_a_model_that_the_patch_does_not_understand_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.blocks[0].attn = torch.nn.MultiheadAttention(192, 3)
    entry = survey.Entry("timm", "mine", "VisionTransformer", "", 0, lambda: (model, torch.empty(0)))
    assert survey.outcome(entry) == "blocks.0.attn: MultiheadAttention is not supported"


def test_the_table_is_read_as_it_is_written(entries):
    lines = survey.lines([(entry, None if is_small(entry) else "because") for entry in entries])
    assert survey.read(survey.table(lines)) == lines
    assert sum(line.names for line in lines) == len(entries)


def test_the_stored_table_holds_what_the_library_has(entries):
    ours = stored(entries)
    assert sum(line.names for line in ours) == len(entries)
    assert sum(line.weights for line in ours) == sum(entry.weights for entry in entries)
    for line in ours:
        of_line = [entry for entry in entries if entry.family in line.families]
        assert (line.names, line.weights) == (len(of_line), sum(entry.weights for entry in of_line)), line.families
        assert {is_small(entry) for entry in of_line} == {line.outcome == "yes"}, line.families
    refused = {entry.family: f"no: {survey.outcome(entry)}" for entry in entries if not is_small(entry)}
    assert refused == {family: line.outcome for line in ours if line.outcome != "yes" for family in line.families}
