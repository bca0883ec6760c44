"""Fine-tuning a tiny DiT: new classes, DiffFit's part, one process or two, and a fit that is killed."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from analytic import CPU
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file

from workflow_scripts.config import FineTune, FitDiT, FitVAE
from workflow_scripts.diffusion import finetune as module
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.checkpoint import open_checkpoint
from workflow_scripts.diffusion.finetune import Scaled, finetune, relabel, separate
from workflow_scripts.diffusion.fit import build_dit, build_vae
from workflow_scripts.errors import ConfigError
from workflow_scripts.team import Team, team

SETTINGS = FineTune(steps=6, batch_size=8, warmup=2, micro_batch=3, checkpoint_every=2, learning_rate=1e-2, ema=0.9)
CLASSES = ("bee", "yak", "ant")
KNOWN = (1, None, 0)  # among the backbone's ant, bee, cat
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TABLE = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"


class Points:
    """Latents in memory."""

    shape = (2, 4, 4)

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.means = random.standard_normal((30, *self.shape), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.means[places], np.full((len(places), *self.shape), -4, np.float32), places % len(CLASSES)


def make_pretrained(folder: Path) -> Path:
    """A DiT of two blocks whose embedders are equal, as in published weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit = build_dit(FitDiT(layers=2, heads=2, head_dim=8), Points.shape, 3)
        for parameter in dit.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        vae = build_vae(FitVAE(channels=(4, 8), latent_channels=2), 8)
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    dit.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False).save_pretrained(folder / "scheduler")
    (folder / "labels.json").write_text(json.dumps(["ant", "bee", "cat"]))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("pretrained"))


def tune(pretrained: Path, folder: Path, settings: FineTune = SETTINGS, processes: Team = Team(CPU)) -> Path:  # noqa: B008
    finetune(pretrained, pretrained, Points(), CLASSES, KNOWN, settings, processes, folder / "work", folder / "out")
    return folder / "out"


def changed(settings: FineTune = SETTINGS, **keys: object) -> FineTune:
    return FineTune.model_validate({**settings.model_dump(), **keys})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / WEIGHTS)


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare weights, but the keys' biases: attention does not depend on them, and Adam follows the rounding of a zero."""
    assert one.keys() == two.keys()
    for key, value in two.items():
        if key.endswith("to_k.bias"):
            continue
        torch.testing.assert_close(one[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def tuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(pretrained, tmp_path_factory.mktemp("tuned"))


# ---------------------------------------------------------------- classes


def test_classes_that_are_known_keep_their_embeddings(pretrained: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(pretrained / "transformer").eval()
    old = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.detach().clone()
    x, time = torch.randn(2, *Points.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    before = {label: model(x, time, torch.full((2,), label)).sample for label in (0, 1, 3)}
    relabel(model, KNOWN, SETTINGS)
    for new, label in ((0, 1), (2, 0), (3, 3)):  # bee, ant, no class
        torch.testing.assert_close(model(x, time, torch.full((2,), new)).sample, before[label])
    tables = {block.norm1.emb.class_embedder.embedding_table for block in model.transformer_blocks}
    assert len(tables) == 1, "equal tables are trained as one"
    (table,) = tables
    torch.testing.assert_close(table.weight[1], old[:3].mean(0))
    assert model.config.num_embeds_ada_norm == 3


def test_new_classes_may_begin_at_random(pretrained: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(pretrained / "transformer")
    relabel(model, [None] * 200, changed(new_classes="random"))
    drawn = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight[:-1].detach()
    old = load_file(pretrained / "transformer/diffusion_pytorch_model.safetensors")[TABLE.format(0)][:-1]
    torch.testing.assert_close(drawn.mean(0), old.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0).mean(), old.std(0, correction=0).mean(), atol=0.01, rtol=0)


def test_tables_that_differ_stay_apart(tmp_path: Path) -> None:
    dit = build_dit(FitDiT(layers=2, heads=2, head_dim=8), Points.shape, 3)
    relabel(dit, KNOWN, SETTINGS)
    one, two = (block.norm1.emb.class_embedder.embedding_table for block in dit.transformer_blocks)
    assert one is not two
    separate(dit).save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


# ---------------------------------------------------------------- a whole fine-tuning


def test_the_result_is_an_ordinary_backbone(tuned: Path, pretrained: Path) -> None:
    checkpoint = open_checkpoint(str(tuned), tuned / "cache")
    assert checkpoint.labels == {"bee": 0, "yak": 1, "ant": 2}
    denoiser = Denoiser.load(tuned, CPU, torch.float32)
    assert denoiser.null_label == 3 and denoiser.label_table.shape == (4, 1, 16)  # type: ignore[union-attr]
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tuned / "vae" / name).read_bytes() == (pretrained / "vae" / name).read_bytes()
    AutoencoderKL.from_pretrained(tuned / "vae")
    assert not any("gamma" in key or ".linear.linear" in key for key in weights(tuned))


def test_difffit_moves_its_part_alone(tuned: Path, pretrained: Path) -> None:
    before, after = load_file(pretrained / WEIGHTS), weights(tuned)
    assert before.keys() == after.keys()
    moved = {key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])}
    tables = {key for key in before if "embedding_table" in key}
    folded = {key for key in before if key.endswith(("attn1.to_out.0.weight", "ff.net.2.weight"))}
    assert moved == {key for key in before if key.endswith(".bias")} | tables | folded
    for key in folded:  # only by a factor for each output
        ratio = after[key] / before[key]
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    kept = load_file(tuned.parent / "work" / "transformer.safetensors")
    assert not any("to_q.weight" in key for key in kept), "what is frozen is not in the checkpoint"


def test_folding_changes_no_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    scaled = Scaled(torch.nn.Linear(5, 4))
    scaled.gamma.data = torch.randn(4, generator=generator)
    x = torch.randn(3, 5, generator=generator)
    before = scaled(x)
    torch.testing.assert_close(scaled.folded()(x), before)


def test_all_weights_can_be_trained(pretrained: Path, tmp_path: Path) -> None:
    after, before = weights(tune(pretrained, tmp_path, changed(trainable="all"))), load_file(pretrained / WEIGHTS)
    assert all(before[key].shape != after[key].shape or not torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(after[TABLE.format(0)], after[TABLE.format(1)])
    for key in after:
        if "timestep_embedder" in key:
            torch.testing.assert_close(after[key], after[key.replace("blocks.0", "blocks.1")])


def test_training_reduces_the_loss(pretrained: Path, tmp_path: Path) -> None:
    """Thirty fixed points: their noise can be told from them better after training than before."""
    losses = []
    for steps in (1, 100):
        settings = changed(trainable="all", steps=steps, batch_size=32, micro_batch=32, learning_rate=3e-3)
        denoiser = Denoiser.load(tune(pretrained, tmp_path / str(steps), settings), CPU, torch.float32)
        process = module.Process(denoiser.abar, CPU)
        generator = torch.Generator().manual_seed(1)
        x0 = torch.from_numpy(Points().means)
        noise, time = torch.randn(x0.shape, generator=generator), torch.arange(0, 990, 33)
        with torch.no_grad():
            losses.append(float(process.simple_loss(_eps(denoiser), x0, noise, time, torch.arange(30) % 3)))
    assert losses[1] < 0.8 * losses[0]


def _eps(denoiser: Denoiser):  # type: ignore[no-untyped-def]
    class Answer:
        def __init__(self, sample: torch.Tensor):
            self.sample = sample

    return lambda x, time, label: Answer(denoiser.model(x, time, label).sample[:, : x.shape[1]])


# ---------------------------------------------------------------- how it is computed


def test_the_micro_batch_changes_rounding_only(tuned: Path, pretrained: Path, tmp_path: Path) -> None:
    assert_close(weights(tune(pretrained, tmp_path, changed(micro_batch=8))), weights(tuned), 1e-5)
    keys = {"micro_batch": 1, "gpus": 4, "checkpoint_every": 7}
    assert changed(**keys).identity() == SETTINGS.identity() != changed(batch_size=16).identity()


class Killed(BaseException):
    """A signal, as far as the fit can tell."""


def test_a_killed_fine_tuning_resumes_to_the_same_weights(
    tuned: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, clip = 0, torch.nn.utils.clip_grad_norm_

    def clip_or_die(*arguments: object) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == 4:
            raise Killed
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_die)
    with pytest.raises(Killed):
        tune(pretrained, tmp_path)
    assert not (tmp_path / "out").exists()
    resumed = tune(pretrained, tmp_path)
    assert made == 8, "only what came after the last checkpoint is repeated"
    assert_close(weights(resumed), weights(tuned), 1e-6)


def be_one_of_two(rank: int, port: int, pretrained: Path, folder: Path) -> None:
    """Be a process that torchrun started."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with team(CPU) as processes:
        assert (processes.rank, processes.size) == (rank, 2)
        tune(pretrained, folder, changed(steps=4), processes)  # shares of 4 in parts of 3 and 1


def test_two_processes_give_the_weights_of_one(pretrained: Path, tmp_path: Path, programs: support.Programs) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [programs.start(be_one_of_two, rank, port, pretrained, tmp_path / "two") for rank in (0, 1)]
    for ended in [process.wait(400) for process in started]:
        assert ended.code == 0, ended.stderr
    alone = tune(pretrained, tmp_path / "one", changed(steps=4))
    assert_close(weights(tmp_path / "two" / "out"), weights(alone), 2e-5)


def test_a_batch_that_cannot_be_shared_is_refused(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: 8 cannot be shared equally among 3"):
        tune(pretrained, tmp_path, SETTINGS, Team(CPU, 0, 3))
    with pytest.raises(ValueError, match=r"cannot be shared equally among 3 gpus"):
        changed(gpus=3)
