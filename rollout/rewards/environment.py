"""Which environment variables reach a reward worker: those of this list, and those that
reward.environment names.

Keys and tokens of the user's accounts stay with the run: a reward that needs one is given it by
name.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from tandem.engine.core.errors import ConfigError

NAMES = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "TERM",
        "TZ",
        "LANG",
        "LANGUAGE",
        "TMPDIR",
        "TEMP",
        "TMP",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "DYLD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "CUDA_HOME",
        "NVIDIA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_CACHE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_CACHE",
        "TRANSFORMERS_OFFLINE",
        "TORCH_HOME",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "NLTK_DATA",
        "TOKENIZERS_PARALLELISM",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "NO_PROXY",
        "no_proxy",
    ]
)
PREFIXES = (
    "LC_",
    "PYTHON",
    "OMP_",
    "MKL_",
    "KMP_",
    "OPENBLAS_",
    "NUMEXPR_",
    "VECLIB_",
    "COVERAGE_",
)
SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


def worker_environment(named: Sequence[str]) -> dict[str, str]:
    """The environment of a reward worker.

    `named` is reward.environment. Raises ConfigError for a variable that is not set.
    """
    for name in named:
        if name not in os.environ:
            raise ConfigError(
                f"reward.environment names {name!r}, but no environment variable of that "
                "name is set where the run was started; set it, or remove the name"
            )
    environment = {}
    for name, value in os.environ.items():
        if name in named or allowed(name):
            environment[name] = value
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return environment


def allowed(name: str) -> bool:
    if name in NAMES:
        return True
    return name.startswith(PREFIXES) and not SECRET.search(name)


def hint(text: str, environment: Mapping[str, str]) -> str:
    """`text`, and how to pass a variable on if the text speaks of one that is set here and not in
    `environment`; '' adds nothing.
    """
    words = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]{3,}", text))
    mentioned = words.intersection(os.environ)
    missing = sorted(mentioned.difference(environment))
    if not missing:
        return text
    return (
        f"{text} [reward workers do not have the environment variable {missing[0]}; to pass it "
        f"on, set reward.environment=[{', '.join(missing)}]]"
    )
