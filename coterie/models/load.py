"""From a recipe to a tokenizer and a model: fresh from a configuration, from a folder, or from the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from coterie.errors import UserError, closest, first_line, nearest
from coterie.models.adapters import quantise
from coterie.models.codec import Codec
from coterie.models.gguf import PACKAGED, model_home
from coterie.models.hub import hub_reason, why_unreachable
from coterie.models.quantised import Quantised
from coterie.models.template import Chat
from coterie.noise import key
from coterie.recipe import Recipe, load_recipe
from coterie.recipe.paths import is_local_path
from coterie.recipe.settings import ModelShape


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of a command's own output."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def choose_device(name: str) -> torch.device:
    """The GPU where there is one, unless the recipe names a device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, and torch sees no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_config(recipe: Recipe) -> PretrainedConfig:
    """The model's configuration, checked before any weights are read."""
    if isinstance(recipe.model, ModelShape):
        return _fresh_config(recipe.model)
    return _config_of(model_folder(recipe.model))


def model_folder(model: str) -> str:
    """Where a model is read from, as `model_home`. Raises UserError where a local folder lacks what loading it needs; hub ids pass."""
    model = model_home(model)
    path = Path(model)
    if not path.exists() and not is_local_path(model):
        return model
    if not path.is_dir():
        first = f"; train it first: coterie train {path.name}" if path.parts[0] == "runs" else ""
        raise UserError(f"model: the folder {model} does not exist{first}")
    if not (path / "config.json").is_file():
        raise UserError(f"model: {model} has no config.json, so it is no model in Hugging Face format")
    if (path / "adapter_config.json").is_file():  # it names a model elsewhere, and modules to import
        raise UserError(f"model: {model} is an adapter (it has adapter_config.json); merge it into its model first")
    if not list(path.glob("*.safetensors")):
        raise UserError(f"model: {model} has no weights: a *.safetensors file is needed (pickled weights are refused)")
    return model


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes of UTF-8, and an end token: any text, no vocabulary to learn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(("<end>", *alphabet))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def codec_of(
    source: str | PreTrainedTokenizerBase, model: str | ModelShape | None = None, chat: Chat | None = None
) -> Codec:
    """A tokenizer, or that of a folder or hub id, for a model, which without a word is the one beside it.

    Its end tokens are the union of what the files of both say, which may be two places.
    """
    source, model = (model_home(one) if isinstance(one, str) else one for one in (source, model))
    tokenizer = _from_hub(AutoTokenizer, source) if isinstance(source, str) else source
    model = model or (source if isinstance(source, str) else None)
    homes = dict.fromkeys(home for home in (source, model) if isinstance(home, str))
    configs = {home: _config_file(home) for home in homes}
    stated = [part.get("eos_token_id") for config in configs.values() for part in (config, _text_part(config))]
    stated += [_generation_ends(home) for home in homes]
    known = None
    if isinstance(model, ModelShape):
        stated.append(getattr(_fresh_config(model), "eos_token_id", None))
    elif model is not None:
        known = _text_part(configs[model]).get("vocab_size", configs[model].get("vocab_size"))
    return Codec.of(tokenizer, *stated, chat=chat, vocabulary_size=known)


def _config_file(home: str) -> dict[str, Any]:
    """The content of config.json, without what a class would fill in; nothing where there is none, as beside a tokenizer alone."""
    if not Path(home).exists():
        why_unreachable()
    try:
        return dict(PretrainedConfig.get_config_dict(home)[0])
    except OSError:
        return {}


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part about text, of a model that sees pictures too."""
    return config.get("text_config") or {}


def _generation_ends(home: str) -> int | list[int] | None:
    """The end tokens of generation_config.json, which a model need not have."""
    try:
        return GenerationConfig.from_pretrained(home).eos_token_id
    except Exception as error:  # broad: the hub's client, the network, and what the file holds
        if (Path(home) / "generation_config.json").is_file():
            raise UserError(f"model: {home}/generation_config.json can't be read: {error}") from error
    return None


def start_model(recipe: Recipe, codec: Codec, device: torch.device) -> PreTrainedModel:
    """The model that training starts from. A fresh one depends on the recipe's seed alone."""
    if isinstance(recipe.model, str):
        return load_model(recipe.model, device, recipe.lora.base if recipe.lora is not None else "float32")
    highest = max(codec.tokenizer.get_vocab().values())  # ids may have gaps
    config = _fresh_config(recipe.model, vocab_size=max(len(codec.tokenizer), highest + 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(recipe.seed, "weights") % 2**63)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(device=device, dtype=torch.float32)


def load_model(source: str, device: torch.device, base: str = "float32") -> PreTrainedModel:
    """A model from a folder or the hub, from safetensors only. base: as `lora.base`; whatever it does not name is float32."""
    source = model_folder(source)
    for name in _config_of(source).architectures or ():
        if name.endswith("ForSequenceClassification"):
            raise UserError(f"model: {source} gives scores ({name}) and writes no text; it is a reward model")
    if base == "float32":
        return _from_hub(AutoModelForCausalLM, source, dtype=torch.float32, use_safetensors=True).to(device)
    model = _from_hub(AutoModelForCausalLM, source, dtype="auto", use_safetensors=True)  # no wider than the file
    quantise(model, base)
    for module in model.modules():
        if not isinstance(module, Quantised):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return model.to(device)


def check_scorer(source: str) -> str:
    """Where a reward model is: `source`, or the folder `model` in it where it is a run. Reads no weights.

    Raises UserError where nothing is there, or something else than a model with one score.
    """
    path = Path(source)
    if (path / "recipe.yaml").is_file():
        source = str(path / "model")
        if not (path / "model").is_dir():
            raise UserError(f"model: the run {path} has no model yet; it is written when the run has finished")
    source = model_folder(source)
    config = _config_of(source)
    kinds = config.architectures or ["a model of no stated kind"]
    if not kinds[0].endswith("ForSequenceClassification"):
        raise UserError(f"model: {source} is {kinds[0]}, and a reward model is one ForSequenceClassification")
    if config.num_labels != 1:
        raise UserError(f"model: {source} gives {config.num_labels} scores, and a reward model gives one")
    return source


def load_score_model(source: str, device: torch.device) -> tuple[PreTrainedModel, Codec]:
    """A reward model and its tokenizer, in float32 and from safetensors only, frozen. Raises UserError as `check_scorer`."""
    recipe = Path(source) / "recipe.yaml"
    chat = Chat.of(load_recipe(str(recipe)) if recipe.is_file() else None)  # its pairs were rendered with
    source = check_scorer(source)
    model, found = _from_hub(
        AutoModelForSequenceClassification, source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:
        raise UserError(f"model: {source} lacks weights: {', '.join(sorted(found['missing_keys']))}")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(f"model: {type(model).__name__} has no plain head, and can't be read off the last token")
    codec = codec_of(source, chat=chat)
    num_known = model.get_input_embeddings().weight.shape[0]
    if len(codec.tokenizer) > num_known:
        raise UserError(f"model: {source} knows {num_known} tokens, and its tokenizer has {len(codec.tokenizer)}")
    return model.requires_grad_(False).to(device), codec


def _fresh_config(shape: ModelShape, **more: Any) -> PretrainedConfig:
    settings = dict(shape.model_extra or {})
    try:
        known = AutoConfig.for_model(shape.type)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raise UserError(
            f"model.type: there is no {shape.type!r}; {nearest(shape.type, CONFIG_MAPPING.keys())}"
        ) from None
    allowed = {*known.to_dict(), *known.attribute_map}
    for name in settings:
        if name not in allowed:
            raise UserError(f"model.{name}: {shape.type} has no such setting; {nearest(name, allowed)}")
    without_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    try:
        config = AutoConfig.for_model(shape.type, **{**without_ids, **settings, **more})
    except Exception as error:  # each configuration class checks its values in its own way
        raise UserError(f"model: {shape.type} refuses these settings: {error}") from error
    _check_brings_no_code(config, shape.type)
    return config


def _config_of(source: str) -> PretrainedConfig:
    """The configuration of a model folder or hub id, which brings no code."""
    config: PretrainedConfig = _from_hub(AutoConfig, source)
    _check_brings_no_code(config, source)
    return config


def _check_brings_no_code(config: PretrainedConfig, source: str) -> None:
    """UserError where an implementation is named that transformers would load from the hub as a kernel, which is code."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _check_brings_no_code(value, source)
        elif name.endswith("_implementation_internal") and isinstance(value, str) and "/" in value:
            setting = name.strip("_").removesuffix("_internal")
            raise UserError(f"model: {source}: {setting} is {value!r:.80}, code from the hub, which is not run")


def _from_hub(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained`, with one paragraph instead of a traceback where it fails."""
    local = Path(source).exists()
    if not local:
        why_unreachable()  # asked first: then what is not here is refused at once
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)  # unset, it asks on the terminal
    except Exception as error:  # the hub's client raises its own, the network's and the file system's errors
        logging.getLogger(__name__).debug("from_pretrained failed", exc_info=error)
        if local:
            raise UserError(f"model: {source} can't be loaded: {first_line(error)}") from error
        meant = closest(source, PACKAGED, 0.8)
        guess = f" (did you mean {meant!r}?)" if meant else ""
        raise UserError(
            f"model: {source} is no folder here{guess}, and can't be loaded from the hub: {hub_reason(error)}"
        ) from error
