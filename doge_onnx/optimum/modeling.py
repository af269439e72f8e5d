"""A bundle as a model of transformers, through Optimum's class for ONNX graphs.

Knows what Optimum's class does not: the size of the state, the free rows of a window state, and
the context length. transformers brings `generate`, sampling, beams and streamers.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.constants import HUGGINGFACE_HUB_CACHE
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from torch import Tensor
from transformers import (
    AutoConfig,
    DogeConfig,
    PretrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils.hub import cached_file

import doge_onnx
from doge_onnx.bundle import MANIFEST_NAME, Manifest, is_bundle
from doge_onnx.errors import BundleError, InputError
from doge_onnx.export.model_config import MODEL_TYPES
from doge_onnx.optimum.command import export_options
from doge_onnx.runtime.engine.input_checks import check_room
from doge_onnx.runtime.engine.io_names import POSITION_IDS, past_names
from doge_onnx.runtime.engine.threads import preferred_threads

Past = tuple[tuple[Tensor, Tensor], ...]
_ERROR = 3
# Of a free row of a window state. A manifest says so, too, but `save_pretrained` writes none.
_CLOSED_GATE = -1e30


class _Doge2Config(DogeConfig):
    model_type = "doge2"


# transformers does not know the type, and reads no config of a type that it does not know.
AutoConfig.register(_Doge2Config.model_type, _Doge2Config, exist_ok=True)


class _EndOfContext(StoppingCriteria):
    """Ends generation at the context length.

    The longest sequence of a batch has no padding, so its length is the batch's.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        batch, length = input_ids.shape
        return torch.full((batch,), length >= self._length, device=input_ids.device)


# Optimum's classes have no types.
class ORTDogeForCausalLM(ORTModelForCausalLM):  # type: ignore[misc]
    """A Doge bundle that transformers' `generate`, pipelines and streamers can run.

    Example:
        >>> model = ORTDogeForCausalLM.from_pretrained("bundle")
        >>> tokenizer = AutoTokenizer.from_pretrained("bundle", padding_side="left")
        >>> inputs = tokenizer(["Once upon", "It was a dark"], padding=True, return_tensors="pt")
        >>> model.generate(**inputs, max_new_tokens=50)

    Attributes:
        context_length: Most tokens of one sequence; None if there is no limit, or no manifest.
    """

    context_length: int | None = None

    def __init__(self, **kwargs: Any) -> None:
        """Called by `from_pretrained` with the files and the session that Optimum found.

        Raises:
            BundleError: The graph's state is not that of a bundle.
        """
        super().__init__(**kwargs)
        shape = self.input_shapes.get(past_names(1)[0], [])
        if [type(size) for size in shape] != [str, int, str, int]:
            raise BundleError(
                f"{self.path} is not the graph of a bundle: its state has the shape {shape}; make "
                "one with `doge-onnx export`"
            )
        # Optimum assumes one state head for each query head, of a query's size.
        _, self.num_key_value_heads, _, self.embed_size_per_head = shape
        self._window: int | None = None
        if POSITION_IDS in self.input_names:
            # The generation that transformers does not know has its window in another field.
            other = getattr(self.config, "window_size", None)
            self._window = self.config.keep_window_size if other is None else other

    def generate(
        self, *args: Any, stopping_criteria: list[StoppingCriteria] | None = None, **kwargs: Any
    ) -> Any:
        """Continue prompts as transformers does, up to the context length."""
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if self.context_length is not None:
            criteria.append(_EndOfContext(self.context_length))
        return super().generate(*args, stopping_criteria=criteria, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Feed S new tokens to a state.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: int64 `[B, T]`, of all T tokens so far, 0 for padding. None means no
                padding; with a window state it is allowed only at the beginning of a text.
            past_key_values: The state that an earlier call returned; None at the beginning.
            position_ids: Ignored: positions are counted from the mask.
            use_cache: Whether to return the state; None takes the config's value.
            kwargs: Passed on to Optimum.

        Returns:
            A `CausalLMOutputWithPast` with logits float32 `[B, S, V]`.

        Raises:
            InputError: A sequence is longer than the context, or the mask does not fit.
        """
        batch, new = input_ids.shape
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if attention_mask is None:
            if self._window is not None and past:
                raise InputError("after the first tokens, a window state needs an attention_mask")
            attention_mask = input_ids.new_ones(batch, past + new)
        expected = (batch, past + new)
        # The number of rows of a window state is not the number of tokens so far.
        if self._window is not None:
            expected = (batch, max(past + new, attention_mask.shape[-1]))
        if tuple(attention_mask.shape) != expected:
            raise InputError(
                f"attention_mask is of shape {list(attention_mask.shape)}, but with {past} tokens "
                f"in the state and {new} new ones it must be {list(expected)}"
            )
        if self.context_length is not None:
            check_room(attention_mask.to("cpu", torch.int64).numpy().sum(1), self.context_length)
        if self._window is not None:
            if use_cache is None:
                use_cache = bool(self.config.use_cache)
            return self._forward_window(
                self._window, input_ids, attention_mask, past_key_values, use_cache
            )
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _forward_window(
        self, window: int, input_ids: Tensor, mask: Tensor, past: Past | None, use_cache: bool
    ) -> Any:
        """`forward` for a state of `window` rows, in pieces of at most `window` tokens."""
        if self.use_io_binding:
            raise InputError(
                "a window state cannot be used with IO binding, which binds a row for each token; "
                "set use_io_binding=False"
            )
        new = input_ids.shape[1]
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -new:]
        mask = mask[:, -new:]
        logits = []
        for begin in range(0, new, window):
            piece = slice(begin, begin + window)
            output = super().forward(
                input_ids[:, piece],
                attention_mask=mask[:, piece],
                position_ids=positions[:, piece],
                past_key_values=self._with_free_rows(past, window, input_ids[:, piece]),
                use_cache=True,
            )
            logits.append(output.logits)
            past = output.past_key_values
        output.logits = torch.cat(logits, dim=1)
        if not use_cache:
            output.past_key_values = None
        return output

    def _with_free_rows(self, past: Past | None, window: int, input_ids: Tensor) -> Past:
        """A window state with free rows for the new tokens; the graph overwrites them."""
        batch, new = input_ids.shape
        rows = 0 if past is None else past[0][0].shape[2]
        free = min(rows + new, window) - rows
        shape = (batch, self.num_key_value_heads, free, self.embed_size_per_head)
        value = torch.zeros(shape, device=input_ids.device)
        key = value.clone()
        heads = self.config.num_attention_heads
        gate = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        key[..., gate] = _CLOSED_GATE
        if past is None:
            layers: int = self.config.num_hidden_layers
            return ((key, value),) * layers
        return tuple(
            (torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2))
            for old_key, old_value in past
        )

    @classmethod
    def _from_pretrained(
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        *,
        revision: str = "main",
        cache_dir: str = HUGGINGFACE_HUB_CACHE,
        force_download: bool = False,
        local_files_only: bool = False,
        token: bool | str | None = None,
        session_options: SessionOptions | None = None,
        **kwargs: Any,
    ) -> ORTDogeForCausalLM:
        if config.model_type not in MODEL_TYPES:
            raise BundleError(
                f"{model_id} is a model of the type {config.model_type!r}, not a Doge; use "
                "ORTModelForCausalLM"
            )
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        if session_options is None:
            session_options = SessionOptions()
            session_options.log_severity_level = _ERROR
            session_options.intra_op_num_threads = preferred_threads()
        # `save_pretrained` writes no manifest.
        path = cached_file(
            str(model_id), MANIFEST_NAME, **hub, _raise_exceptions_for_missing_entries=False
        )
        manifest = None
        if path is not None:
            manifest = Manifest.from_json(Path(path).read_text(encoding="utf-8"), Path(path))
            kwargs.setdefault("file_name", PurePosixPath(manifest.graph).name)
        model: ORTDogeForCausalLM = super()._from_pretrained(
            model_id, config, session_options=session_options, **hub, **kwargs
        )
        if manifest is not None and manifest.state.kind == "window":
            model._window = manifest.state.keep_window_size
        elif manifest is not None:
            model.context_length = manifest.context_length
        return model

    @classmethod
    def _export(
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str = HUGGINGFACE_HUB_CACHE,
        force_download: bool = False,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        token: bool | str | None = None,
        **kwargs: Any,
    ) -> ORTDogeForCausalLM:
        """Export a checkpoint with this package's exporter, and load the bundle.

        Keyword arguments that `doge_onnx.export` has are passed to it; the others are those of
        `from_pretrained`.
        """
        # Optimum exports every directory without a graph that it knows.
        if is_bundle(model_id):
            raise BundleError(
                f"{model_id} is a bundle, but its graph is not an .onnx file, which is all that "
                "Optimum loads; export it again"
            )
        local = Path(model_id).is_dir()
        fetching = token or force_download or cache_dir != HUGGINGFACE_HUB_CACHE
        if subfolder or (fetching and not local):
            raise InputError(
                "with export=True, of the options for the Hub only revision is supported; fetch "
                "the model first, and name its directory"
            )
        options = {name: kwargs.pop(name) for name in export_options() if name in kwargs}
        # Optimum passes a branch by default, but a directory has none.
        branch = None if local else revision
        # Windows removes no file that is mapped, which the weights still are as Python exits.
        place = TemporaryDirectory(ignore_cleanup_errors=True)
        bundle = Path(place.name, "bundle")
        doge_onnx.export(model_id, bundle, revision=branch, **options)
        # The model keeps `place` as long as it needs the files.
        return cls._from_pretrained(bundle, config, model_save_dir=place, **kwargs)
