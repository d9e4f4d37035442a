"""The one settings model: defaults, then a YAML file, then DS_SERVE_* variables, then flags, the last wins.

Knows names, types and ranges of settings; knows nothing of what they do. Read by cli, pipeline, server
and rank; handed from the server to its engine process as JSON, which holds no secrets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(value: Any) -> Any:
    """'8GiB', '512MB' or a number of bytes -> int. Raises ValueError on anything else that is text."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", value.upper())
    if match is None:
        raise ValueError(f"{value!r} is not a size: write bytes, or a number with KiB, MiB, GiB, KB, MB, GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def parse_counts(value: Any) -> Any:
    """'10,12,10' -> [10, 12, 10]. Raises ValueError for text that is not a list of numbers."""
    if not isinstance(value, str):
        return value
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise ValueError(f"{value!r} is not a list of numbers such as 10,12,10") from None


Counts = Annotated[list[Annotated[int, Field(ge=1)]], NoDecode, BeforeValidator(parse_counts)]


def parse_list(value: Any) -> Any:
    """'a, b' -> ['a', 'b']. Raises ValueError for text that names nothing; never repeats it."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise ValueError("is set, but empty or with nothing between two commas")
    return parts


def parse_adapters(value: Any) -> Any:
    """'fr=/a,de=/b' -> {'fr': '/a', 'de': '/b'}. Raises ValueError for text that is no such list."""
    if isinstance(value, dict):
        return {name: str(folder) if isinstance(folder, Path) else folder for name, folder in value.items()}
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for part in value.split(",") if value.strip() else []:
        name, equals, folder = (each.strip() for each in part.partition("="))
        if not (name and equals and folder):
            raise ValueError(f"{part!r} is not NAME=DIRECTORY; write NAME=DIRECTORY,NAME=DIRECTORY")
        if name in found:
            raise ValueError(f"{name!r} is given twice: {found[name]} and {folder}")
        found[name] = folder
    return found


Adapters = Annotated[dict[str, str], NoDecode, BeforeValidator(parse_adapters)]
Names = Annotated[list[str], NoDecode, BeforeValidator(parse_list)]
Secrets = Annotated[list[SecretStr], NoDecode, BeforeValidator(parse_list)]


class Settings(BaseSettings):
    """Everything that can be set. Field descriptions are the command line's help texts.

    Secrets are the fields that no dump includes (SECRETS); they come from the environment or the YAML file.
    """

    model_config = SettingsConfigDict(
        env_prefix="DS_SERVE_", extra="forbid", protected_namespaces=(), populate_by_name=True
    )

    model: str = Field(description="directory of a Hugging Face causal LM (safetensors)")
    served_model_name: str | None = Field(None, description="name in the API; default: the directory's name")
    adapters: Adapters = Field(
        {}, description="LoRA adapters (peft) that requests name as their model (fr=/path,de=/path)"
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model directory brings")
    check: bool = Field(
        False, description="at start, compare each layer with transformers' own; refuse to serve a mismatch"
    )
    tool_format: Literal["auto", "hermes", "mistral", "llama"] = Field(
        "auto", description="how the model writes calls of tools; auto: as its chat template does"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as the checkpoint says"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: DeepSpeed's accelerator")
    num_threads: int | None = Field(
        None, ge=1, description="threads of the CPU kernels; default: OMP_NUM_THREADS or all cores"
    )

    max_model_len: int | None = Field(
        None,
        ge=2,
        description="longest prompt + output in tokens; default: the model's, or what the cache holds",
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens in a KV block")
    num_blocks: int | None = Field(None, ge=1, description="KV blocks; default: from kv_cache_memory")
    kv_cache_memory: Bytes | None = Field(
        None,
        ge=1,
        description="bytes for KV blocks (8GiB); default: on a CPU 30%% of free memory, at most 4 GiB, on "
        "CUDA what device_memory_utilization leaves",
    )
    device_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of a CUDA device's memory that may be in use: weights, the largest step and KV; "
        "default: 0.9",
    )
    window_blocks: Literal["auto", "off"] = Field(
        "auto", description="auto: KV blocks that left a layer's sliding window are free for others"
    )
    prefix_caching: bool = Field(True, description="find prefixes of earlier requests in the cache")

    host_cache: Bytes = Field(
        0, ge=0, description="bytes of CPU memory for evicted prefixes (8GiB), split evenly over ranks"
    )
    host_checksums: bool = Field(False, description="verify host blocks when they come back")
    max_pinned_share: float = Field(0.5, ge=0, le=1, description="share of KV blocks that may be pinned")
    audit_share: float = Field(0.0, ge=0, le=1, description="share of prefix hits that are recomputed")

    max_num_seqs: int = Field(64, ge=1, le=4096, description="requests in one step at most")
    max_num_batched_tokens: int = Field(2048, ge=1, description="tokens in one step at most")
    max_queue: int = Field(10_000, ge=1, description="waiting requests at most")
    steps_in_flight: int | None = Field(
        None, ge=1, le=64, description="steps planned ahead; default: one more than there are stages"
    )

    attention: Literal["auto", "reference", "cpu", "flashinfer"] = Field(
        "auto",
        description="attention backend; auto: FlashInfer on CUDA, the C++ op on CPU, else the reference",
    )
    injection: Literal["auto", "off"] = Field("auto", description="fused modules for known layers")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="decoder layers that are not fused by torch.compile; auto: on CUDA"
    )
    graphs: Literal["auto", "off"] = Field(
        "auto", description="decode steps as CUDA graphs; auto: on CUDA, where the attention backend can"
    )
    latent_cache: Literal["auto", "off"] = Field(
        "auto",
        description="cache latents in place of keys and values where the model has them (DeepSeek); "
        "off: several times the memory, slower answers, faster reading of long prompts",
    )

    tensor_parallel: int = Field(1, ge=1, description="tensor shards of each stage (--tp)")
    pipeline_parallel: int = Field(1, ge=1, description="pipeline stages (--pp); ranks = tp x pp")
    stage_layers: Counts | None = Field(
        None, description="decoder layers of each stage (10,12,10); default: balanced by weight"
    )
    all_reduce: Literal["auto", "shared_memory", "peer", "group"] = Field(
        "auto",
        description="sum over tensor shards: DeepSpeed's shared memory (CPU), peer memory (CUDA), or the "
        "process group",
    )
    rank_timeout: float = Field(
        5.0, ge=1, description="seconds without a sign of progress after which a rank counts as lost"
    )

    host: str = Field("127.0.0.1", description="address to serve on")
    port: int = Field(8000, ge=0, le=65535, description="port to serve on")
    api_key_file: str | None = Field(
        None, description="file of API keys, one a line, # begins a comment; default: no key is asked for"
    )
    api_keys: Secrets = Field([], exclude=True, description="more API keys, separated by commas")
    open_metrics: bool = Field(False, description="serve /metrics without a key too")
    cors_origins: Names = Field(
        [], description="web origins whose pages may call the API (https://a.example,https://b.example, or *)"
    )
    ssl_keyfile: str | None = Field(None, description="TLS: private key (PEM)")
    ssl_certfile: str | None = Field(None, description="TLS: certificate chain (PEM)")
    ssl_keyfile_password: SecretStr | None = Field(
        None, exclude=True, description="TLS: password of ssl_keyfile"
    )
    ssl_ca_certs: str | None = Field(
        None, description="TLS: clients must show a certificate that one of these CAs signed (PEM)"
    )

    max_request_bytes: Bytes = Field(16 * 2**20, ge=1, description="bytes of a request body at most (16MiB)")
    max_open_requests: int | None = Field(
        None, ge=1, description="open HTTP requests at most; default: max_num_seqs + max_queue"
    )
    body_timeout: float = Field(60.0, gt=0, description="seconds in which a request must have arrived whole")
    request_timeout: float | None = Field(
        None, gt=0, description="seconds for an answer at most; default: no limit but the client's own"
    )
    stream_stall_timeout: float = Field(
        300.0, gt=0, description="seconds after which a client that takes nothing of its answer is dropped"
    )
    drain_timeout: float = Field(
        120.0, ge=0, description="seconds that open requests have to end when the server is told to stop"
    )

    access_log: bool = Field(True, description="a line of JSON for each request, to stderr")
    log_prompts: bool = Field(False, description="log the bodies of requests too, prompts and all")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much is logged")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @classmethod
    def load(cls, config_file: str | None = None, **flags: Any) -> Settings:
        """Settings from a YAML file, the environment and flags, the last wins.

        Raises FileNotFoundError for a missing file, pydantic.ValidationError for a bad or unknown field.
        """
        if config_file is None:
            return cls(**flags)
        if not Path(config_file).is_file():
            raise FileNotFoundError(f"no configuration file {config_file}")

        class WithFile(cls):
            @classmethod
            def settings_customise_sources(cls, settings_cls, init_settings, env_settings, **_):
                return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, config_file)

        settings = WithFile(**flags)
        return cls.model_construct(**{name: getattr(settings, name) for name in cls.model_fields})

    @model_validator(mode="after")
    def _check_stages(self) -> Settings:
        if self.stage_layers is not None and len(self.stage_layers) != self.pipeline_parallel:
            raise ValueError(
                f"stage_layers names {len(self.stage_layers)} stages, "
                f"but pipeline_parallel is {self.pipeline_parallel}"
            )
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> Settings:
        for name in ("kv_cache_memory", "num_blocks"):
            if self.device_memory_utilization is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"device_memory_utilization: does nothing beside {name}; give one or the other"
                )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Settings:
        for name in self.adapters:
            if not name or name != name.strip():
                raise ValueError(f"adapters: {name!r} is no name: it is empty, or has blanks around it")
            if name == self.name:
                raise ValueError(f"adapters: {name!r} is the model's own name; give served_model_name")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_keyfile_password"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: needs ssl_certfile too")
        return self

    @property
    def world_size(self) -> int:
        """Ranks: tensor_parallel x pipeline_parallel."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def max_steps_in_flight(self) -> int:
        """Steps planned ahead: as set, or one at work on each stage and one that waits for the first."""
        return self.steps_in_flight or self.pipeline_parallel + 1

    @property
    def tokens_in_flight(self) -> int:
        """Tokens that all steps in flight may compute together."""
        return self.max_steps_in_flight * self.max_num_batched_tokens

    @property
    def open_requests_limit(self) -> int:
        """HTTP requests that the front holds at most: by default as many as the engine takes sequences."""
        return self.max_open_requests or self.max_num_seqs + self.max_queue

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or Path(self.model).resolve().name


SECRETS = tuple(name for name, field in Settings.model_fields.items() if field.exclude)
