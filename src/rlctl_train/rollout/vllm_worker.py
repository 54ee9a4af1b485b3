"""What runs inside vLLM's worker: takes weights layer by layer, and hashes what the layers then hold.

vLLM mixes `WeightReceiver` into its worker class (`worker_extension_cls`), so `self` is the worker.
"""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own)

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlctl_train.checksum import tensor_digest
from rlctl_train.rollout.weights import WeightError, some

# A reload warns of every layer that has buffers and no weights; what counts is checked here by checksum.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
_PROBE_ROWS = 1024
"""Rows of the identity matrix sent through a packed layer at one time, to bound memory."""


class WeightReceiver:
    """Methods added to the worker; each name carries `rlctl` so that it meets none of vLLM's own."""

    model_runner: Any
    vllm_config: Any
    _rlctl_open = False

    def rlctl_divide_logits(self, temperature: float) -> None:
        """Divide all logits by `temperature` from now on, in float32, before anything else looks at them.

        vLLM's raw log-probabilities are those of the undivided logits, its processed ones those after top-k
        and top-p; with the division here the raw ones have rlctl's meaning, and top-k and top-p still act.
        """
        model = self.model_runner.get_model()
        plain: Callable[..., Tensor | None] = type(model).compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Tensor | None:
            logits = plain(model, *args, **kwargs)
            return None if logits is None else logits.float() / temperature

        model.compute_logits = plain.__get__(model) if temperature == 1.0 else compute_logits

    def rlctl_start_update(self) -> None:
        """Open every layer for loading; layers an unfinished update left open are closed first."""
        if self._rlctl_open:
            self._rlctl_close()
        self._rlctl_open = True
        self._rlctl_received: dict[str, tuple[tuple[int, ...], str]] = {}
        self._rlctl_loaded: set[str] = set()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def rlctl_load(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Load one bucket; a layer is made ready as soon as all of it has come."""
        dtype = self.vllm_config.model_config.dtype
        for name, tensor in tensors:
            self._rlctl_received[name] = (tuple(tensor.shape), tensor_digest(tensor, dtype))
        with set_current_vllm_config(self.vllm_config):
            self._rlctl_loaded |= self.model_runner.get_model().load_weights(iter(tensors)) or set()

    def rlctl_finish_update(self) -> dict[str, str]:
        """Close the layers; return a digest per received name, of the values held where they can be read.

        Readable is every linear layer, embedding and norm of an engine on one device. The digest of anything
        else, and of everything when a layer is split over devices, is that of the tensor as received.
        """
        model, config = self.model_runner.get_model(), self.vllm_config
        self._rlctl_close()
        shapes = {name: shape for name, (shape, _) in self._rlctl_received.items()}
        tied = config.model_config.hf_text_config.tie_word_embeddings
        _check_complete(model, shapes, self._rlctl_loaded, tied=tied)
        digests = {name: digest for name, (_, digest) in self._rlctl_received.items()}
        if config.parallel_config.tensor_parallel_size == 1:
            digests |= dict(_held_digests(model, shapes, config.model_config))
        return digests

    def _rlctl_close(self) -> None:
        model, config = self.model_runner.get_model(), self.vllm_config.model_config
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, config)
            _renew_tied_head(model, config)
        self._rlctl_open = False


def _check_complete(model: nn.Module, shapes: dict[str, tuple[int, ...]], loaded: set[str], *, tied: bool) -> None:
    """Raise WeightError unless every parameter of the engine came, joined ones with all their parts."""
    missing = {name for name, _ in model.named_parameters()} - loaded
    if tied:
        missing.discard("lm_head.weight")
    for parts in _by_module(model, shapes).values():
        for kind in ("weight", "bias"):
            names = {f"{part}.{kind}" for part in parts}
            if names & shapes.keys():
                missing |= names - shapes.keys()
    if missing:
        raise WeightError(f"{len(missing)} weights did not come: {some(missing)}")


def _renew_tied_head(model: nn.Module, config: Any) -> None:
    """Let an output projection tied to the embedding see the new embedding, and make sure that it does.

    A reload leaves the projection with its old values where the layer keeps a packed copy (as on CPU).
    """
    if not config.hf_text_config.tie_word_embeddings:
        return
    head: Any = model.get_submodule("lm_head")
    embedding: Any = next(m for m in model.modules() if isinstance(m, VocabParallelEmbedding))
    if head is not embedding:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)
        held = _read(head, "weight", config.dtype)
        if held is None or tensor_digest(held, config.dtype) != tensor_digest(embedding.weight, config.dtype):
            raise WeightError("the output projection does not follow the embedding it is tied to")


@torch.inference_mode()
def _held_digests(model: nn.Module, shapes: dict[str, tuple[int, ...]], config: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, digest of the held values) for every received name that leads to a readable tensor."""
    for module_name, parts in _by_module(model, shapes).items():
        module = model.get_submodule(module_name)
        for kind in ("weight", "bias"):
            names = [f"{part}.{kind}" for part in parts if f"{part}.{kind}" in shapes]
            held = _read(module, kind, config.dtype)
            rows = [shapes[name][0] for name in names]
            # Embeddings are padded with rows that belong to no token: the first rows are the real ones.
            if held is not None and names and sum(rows) <= len(held):
                for name, values in zip(names, held[: sum(rows)].split(rows), strict=True):
                    yield name, tensor_digest(values, config.dtype)


def _by_module(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Map each module of the engine to the modules of the checkpoint it joins, in order (q, k, v in qkv)."""
    joined: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    whole = {part: (new, parts) for new, parts in joined.items() for part in parts}
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    for name in shapes:
        path = name.rpartition(".")[0]
        parent, _, leaf = path.rpartition(".")
        if leaf in whole:
            new, parts = whole[leaf]
            found[f"{parent}.{new}"] = [f"{parent}.{part}" for part in parts]
        else:
            found[path] = [path]
    return {name: parts for name, parts in found.items() if name in modules}


def _read(module: Any, kind: str, dtype: torch.dtype) -> Tensor | None:
    """Return what `module` holds as `weight` [out, in] (or [features]) or as `bias`; None where it cannot be read.

    A linear layer that keeps only a packed copy is read through its own product with the identity matrix:
    that is exact, and it is what the layer computes with.
    """
    held = getattr(module, kind, None)
    packed = kind == "weight" and hasattr(module, "cpu_linear")
    if packed and isinstance(module, ParallelLMHead):
        return _through_identity(module, module.embedding_dim, dtype)
    if isinstance(held, Tensor) and held.numel():
        return held
    return _through_identity(module, module.input_size, dtype) if packed else None


def _through_identity(module: Any, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix [out, in] a layer multiplies by."""
    identity = torch.eye(num_inputs, dtype=dtype)
    return torch.cat([module.quant_method.apply(module, rows) for rows in identity.split(_PROBE_ROWS)]).t()
