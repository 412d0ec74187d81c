"""The command that trains the teacher: its pieces, and that an interrupted run goes on as if nothing had been."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.signals import Interrupted
from megatron_jet.tasks import vocabulary as vocab
from megatron_jet.teacher.curriculum import LAST_PAIRS, Curriculum
from megatron_jet.teacher.model import byte_symbols, save_tokenizer
from megatron_jet.teacher.muon import Muon, orthogonalize
from megatron_jet.teacher.train import TeacherRun, Training, learning_rate_factor, read_checkpoint, train_teacher


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 16), (2, 16, 40)])
def test_orthogonalize_keeps_singular_vectors_and_flattens_singular_values(shape):
    """The iteration's fixed points lie in 0.68 to 1.13 (Jordan et al. 2024); 5 steps bring all but tiny ones there."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    in_basis = u.transpose(1, 2) @ orthogonalize(x, steps=8) @ vh.transpose(1, 2)  # [n, r, r]
    values = torch.diagonal(in_basis, dim1=1, dim2=2)
    assert (in_basis - torch.diag_embed(values)).abs().max() < 1e-8
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_moves_matrices_of_one_shape_independently():
    torch.manual_seed(0)
    start = [torch.randn(8, 4), torch.randn(8, 4)]
    grads = [torch.randn(8, 4), torch.randn(8, 4)]
    together = [torch.nn.Parameter(x.clone()) for x in start]
    alone = torch.nn.Parameter(start[1].clone())
    for params, own in ((together, grads), ([alone], grads[1:])):
        optimizer = Muon(params, lr=0.1)
        for _ in range(3):
            for param, grad in zip(params, own, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(together[1], alone, atol=1e-6, rtol=1e-6)
    assert (alone.detach() - start[1]).norm() > 0.1


def test_tokenizer_maps_bytes_to_themselves(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(map(chr, range(0x800))) + "\U0001f600\uffee→"  # all bytes of two-byte UTF-8, and more
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("<|k3|><|v63|>a").input_ids == [vocab.KEYS + 3, vocab.VALUES + 63, ord("a")]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == vocab.END_OF_TEXT
    assert len(tokenizer) == vocab.VOCAB_SIZE
    assert len(set(byte_symbols())) == 256


def test_curriculum_keeps_hints_until_the_model_looks_back():
    curriculum = Curriculum()
    for _ in range(200):
        curriculum.update({"recall": 1.0, "alternating": 0.0})
    assert curriculum.hint == 0.5 and curriculum.linking
    for _ in range(200):
        curriculum.update({"recall": 1.0, "alternating": 1.0})
    assert curriculum.hint == 0 and not curriculum.linking
    for _ in range(2000):
        curriculum.update({"recall": 1.0, "choice": 1.0, "text": 0.5})
    assert (curriculum.keys, curriculum.pairs) == (vocab.NUM_KEYS, LAST_PAIRS) and curriculum.through


def test_curriculum_batches_fit_256_tokens_and_score_answers_only():
    text = np.random.default_rng(0).integers(0, 256, 4000)
    done = {"recall": 1.0, "alternating": 1.0, "choice": 1.0}
    for curriculum in (
        Curriculum(),
        Curriculum(linking=False, hint=0.0, keys=64, pairs=20, accuracy={"recall": 0.5}),
        Curriculum(linking=False, hint=0.0, keys=64, pairs=LAST_PAIRS, accuracy=done),
    ):
        for batch in curriculum.batches(np.random.default_rng(1), text):
            assert batch.tokens.shape == batch.learned.shape == batch.scored.shape
            assert batch.tokens.shape[1] <= 256
            assert not (batch.scored & ~batch.learned).any()
            assert batch.tokens.max() < vocab.VOCAB_SIZE


def test_learning_rate_warms_up_holds_and_decays():
    assert learning_rate_factor(0, 0.0) == pytest.approx(1 / 30)
    assert learning_rate_factor(100, 0.3) == 1
    assert learning_rate_factor(100, 0.75) == pytest.approx(0.51)
    assert learning_rate_factor(100, 1.0) == pytest.approx(0.02)


def test_interrupted_training_goes_on_bit_for_bit(tmp_path):
    """Two steps, a checkpoint and two more give the weights of four steps: optimisers, curriculum, RNG and all."""
    run = TeacherRun(tmp_path, minutes=1e6, seed=3)  # so long that the schedule does not see the seconds
    straight = Training(run)
    for _ in range(4):
        straight.train_step()
    first = Training(run)
    for _ in range(2):
        first.train_step()
    first.save()
    second = Training(run)
    second.load()
    for _ in range(2):
        second.train_step()
    assert (second.step, second.tokens) == (straight.step, straight.tokens)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_resume_needs_a_checkpoint_of_the_same_seed(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        train_teacher(TeacherRun(tmp_path, 1, 0), resume=True)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"seed": 1}, tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="--seed 1, not 0"):
        train_teacher(TeacherRun(tmp_path, 1, 0), resume=True)


def test_a_checkpoint_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    path.parent.mkdir()
    run = TeacherRun(tmp_path, 1, 0)
    for content in (b"", b"\x80\x04cos\nsystem\n(S'touch PWNED'\ntR.", [1], {"seed": 0}):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=r"last.pt: is .*(damaged|no checkpoint)") as caught:
            train_teacher(run, resume=True)
        assert "\n" not in str(caught.value)


def test_a_stop_signal_saves_what_was_trained(tmp_path, monkeypatch):
    """Also when it comes in the last step, and for a terminal that closes."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        real = Training.train_step

        def stopped(training, real=real, number=number):
            stats = real(training)
            if training.step == 2:
                os.kill(os.getpid(), number)
            return stats

        monkeypatch.setattr(Training, "train_step", stopped)
        before = signal.signal(number, signal.SIG_DFL)
        try:
            with pytest.raises(Interrupted, match="stopped after step 2, checkpoint saved"):
                train_teacher(TeacherRun(tmp_path / number.name, 1e6, 0), log=lambda line: None)
        finally:
            signal.signal(number, before)
        monkeypatch.setattr(Training, "train_step", real)
        assert read_checkpoint(TeacherRun(tmp_path / number.name, 1e6, 0))["clock"][0] == 2


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path):
    training = Training(TeacherRun(tmp_path, minutes=1e6, seed=0))
    training.save()
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    next(training.model.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="holds NaN .*the one before is intact"):
        training.save()
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before


def test_training_learns_to_match(tmp_path):
    """Fifteen steps of the real command's first phase lower the loss of hinted recall far below its start."""
    training = Training(TeacherRun(tmp_path, minutes=1e6, seed=0))
    losses = [training.train_step()["recall"]["loss"] for _ in range(15)]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert json.dumps(training.curriculum.state())
