"""Training on a CPU, in small: what the resumed run does equals what the uninterrupted one does."""

import random

import pytest
import torch
from diffusers import FluxPipeline

from jobs.tiny.data import build_pool
from jobs.tiny.pipeline import DIRECTORY
from jobs.tiny.train import Trainer, eligible, encode, fixed_inputs, flow_loss, flow_networks, lengths_of_steps, rotate


def test_the_order_of_text_lengths_survives_an_interruption() -> None:
    whole, rest = lengths_of_steps(0, 0), lengths_of_steps(0, 7)
    first = [next(whole) for _ in range(20)]
    assert first[7:] == [next(rest) for _ in range(13)]


def test_rotary_embedding_equals_diffusers() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    x, angles = torch.randn(2, 9, 3, 8), torch.randn(9, 4)
    freqs = (angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1))
    torch.testing.assert_close(rotate(x, freqs), apply_rotary_emb(x, freqs, sequence_dim=1))


def test_pool_is_the_same_in_any_number_of_parts() -> None:
    one, other = (build_pool(DIRECTORY, 40, 0, None) for _ in range(2))
    assert torch.equal(one.t5_ids, other.t5_ids) and torch.equal(one.rows, other.rows)
    assert all(0 < length <= 256 for length in one.lengths.tolist())


@pytest.mark.slow
def test_resuming_repeats_the_uninterrupted_run() -> None:
    device = torch.device("cpu")
    pool = build_pool(DIRECTORY, 64, 0, None)
    among, fixed = eligible(pool)[64], fixed_inputs(64, device, torch.float32)

    def begin() -> tuple[Trainer, torch.Tensor]:
        pipeline = FluxPipeline.from_pretrained(DIRECTORY, torch_dtype=torch.float32)
        trainer = Trainer(flow_networks(pipeline, fresh=False), 10, 1e-4, device, capture=False)
        return trainer, encode(pipeline.vae.eval(), pool.rows)

    def losses(trainer: Trainer, latents: torch.Tensor, count: int) -> list[float]:
        step = trainer.stepper(
            lambda: flow_loss(trainer.networks, pool, latents, among, 4, fixed, torch.nn.attention.SDPBackend.MATH)
        )
        found = []
        for _ in range(count):
            trainer.schedule()
            found.append(step().item())
            trainer.done += 1
        return found

    torch.manual_seed(random.Random(0).randrange(2**31))
    trainer, latents = begin()
    losses(trainer, latents, 2)
    state = {
        key: value
        for key, value in torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, trainer.state()
        ).items()
    }
    uninterrupted = losses(trainer, latents, 3)
    resumed, latents = begin()
    resumed.load(state)
    assert losses(resumed, latents, 3) == pytest.approx(uninterrupted, rel=1e-5)
