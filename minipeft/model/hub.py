"""Find a model's folder: the bundled `mini`, a folder on disk, or official weights from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from minipeft.errors import WeightsError
from minipeft.model.weights import CONFIG_FILE, WEIGHTS_FILE

HUB_NAMES = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
             "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl"}

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed package carries a copy of `mini`; in the repository it lies among the checkpoints.
MINI_FOLDER = _PACKAGE / "mini" if (_PACKAGE / "mini").is_dir() else _PACKAGE.parent / "checkpoints" / "mini"


def local(name_or_folder: str | Path) -> Path:
    """The folder that a name or a path means on this machine, which need not be there: without a download."""
    return MINI_FOLDER if str(name_or_folder) == "mini" else Path(name_or_folder)


def official(name_or_folder: str | Path) -> str | None:
    """The short name of the official model that is meant, by that or by the hub's name for it; None of any other model.

    A folder of such a name comes first.
    """
    names = dict(zip(HUB_NAMES.values(), HUB_NAMES)) | {name: name for name in HUB_NAMES}
    return None if local(name_or_folder).is_dir() else names.get(str(name_or_folder))


def find(name_or_folder: str | Path) -> Path:
    """The folder that holds a model's config.json and model.safetensors, downloading an official one if needed.

    Raises:
        WeightsError: an unknown name, a folder without the two files, or no network.
    """
    name = str(name_or_folder)
    folder = local(name)
    if short := official(name):
        return _download(short)
    if not name or not folder.is_dir():
        raise WeightsError(f"model {name!r} is neither a folder nor one of mini, {', '.join(HUB_NAMES)}")
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        raise WeightsError(f"{folder} holds no {' and no '.join(missing)}: a model folder needs both "
                           f"{CONFIG_FILE} and {WEIGHTS_FILE}")
    return folder


def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face hub (or the mirror named by HF_ENDPOINT) answers a request; never in offline mode.

    A download asks this first: it would try six times and wait half a minute before it says that there is no network.

    Args:
        timeout: seconds to wait for the answer. Looking up the hub's address takes as long as the system lets it.
    """
    try:
        from huggingface_hub import constants, get_session

        # Connect, read, write, and wait for a free connection. A name can have several addresses, tried one by one.
        get_session().head(constants.ENDPOINT, timeout=(min(1.0, timeout), timeout, timeout, timeout))
    except Exception:  # the hub client raises its HTTP library's errors, which differ between versions
        return False
    return True  # whatever it answers, it answers


def _download(name: str) -> Path:
    """Fetch an official model into huggingface_hub's cache (with its progress bar, and resuming a broken one)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = HUB_NAMES[name]
    try:
        cached = [hf_hub_download(repository, file, local_files_only=True) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        return Path(cached[0]).parent
    except LocalEntryNotFoundError:
        pass
    advice = (f"put {CONFIG_FILE} and {WEIGHTS_FILE} of {repository} into a folder and pass the folder's path instead "
              "of the name")
    if not hub_is_reachable():
        raise WeightsError(f"model {name!r} is not on this machine and the Hugging Face hub cannot be reached: "
                           f"{advice}")
    try:
        hf_hub_download(repository, CONFIG_FILE)
        return Path(hf_hub_download(repository, WEIGHTS_FILE)).parent
    except Exception as error:  # the hub client raises its HTTP library's errors, which differ between versions
        raise WeightsError(f"downloading {repository} failed ({type(error).__name__}): {advice}") from error
