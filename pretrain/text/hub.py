"""Which files a dataset on the Hugging Face Hub consists of.

What a configuration and a split mean is for `datasets` to say. But its client is not patient: of
huggingface_hub 2.4 the question for a repository ends with one HTTP 503, listings and ranges with
six faults in 23 seconds whatever comes between them, a body that was cut is begun anew, and every
range asks for its redirect again. So `datasets` is not let onto the network: it is shown a folder
that has the repository's dataset card, and its other files as empty ones, and is asked which of
them it would read. The requests behind that folder are our own, and patient (see
pretrain.text.ranges).
"""

import contextlib
import difflib
import glob
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from pretrain.errors import UserError
from pretrain.flags import load_yaml
from pretrain.text.ranges import Fault, Waiting, cause
from pretrain.text.remote import LOGIN, Refused, attempt, hub_token
from pretrain.text.source import Patience, SourceError

CARD, STANDALONE_CARD = "README.md", ".huggingface.yaml"  # the latter takes precedence
LARGEST_CARD = 1 << 23  # characters; FineWeb 2, with 1,900 configurations, has under a million
LARGEST_ANSWER = 1 << 26  # bytes of a card, or of a page of a listing
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


@dataclass(frozen=True)
class HubFile:
    path: str  # within the repository
    size: int  # bytes
    sha256: str | None  # where the Hub knows it: of files in LFS, as all large ones are
    url: str


@dataclass(frozen=True)
class HubDataset:
    commit: str
    config: str
    files: list[HubFile]


def resolve(
    dataset: str, *, name: str | None, split: str, revision: str, patience: Patience
) -> HubDataset:
    """The files of one split, in the order in which `datasets` would read them, at the commit of
    `revision`.

    Raises SourceError that says what is wrong: no such dataset, revision, configuration or split,
    no permission, no Hub for longer than `patience`.
    """
    repo = open_repository(dataset, revision, patience)
    cards = {CARD: _front_matter(repo.text(CARD)), STANDALONE_CARD: repo.text(STANDALONE_CARD)}
    try:
        cards = {path: _plain_card(text) for path, text in cards.items()}
    except UserError as error:
        raise SourceError(f"dataset {dataset}: {error}") from None
    folders = [""]
    if config := _config_of_card(cards, name):
        cards[CARD] = _fenced({"configs": [config]})
        folders = sorted({_fixed_folder(pattern) for pattern in _patterns(config)})
    listing = {entry["path"]: entry for folder in folders for entry in repo.tree(folder)}
    config_name, paths = _ask_datasets(dataset, cards, listing, name=name, split=split)
    files = [
        HubFile(
            path, listing[path]["size"], (listing[path].get("lfs") or {}).get("oid"), repo.url(path)
        )
        for path in paths
    ]
    return HubDataset(repo.commit, config_name, files)


def open_repository(dataset: str, revision: str, patience: Patience) -> "Repository":
    """A dataset's repository at the commit of `revision`. Raises SourceError."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        way_out = "unset it, or read files on this machine with --source"
        raise SourceError(f"dataset {dataset}: HF_HUB_OFFLINE is set; {way_out}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        known = "such as HuggingFaceFW/fineweb-edu; for files on this machine use --source"
        raise SourceError(f"{dataset!r} is not the name of a dataset on the Hub, {known}")
    return Repository(constants.ENDPOINT.rstrip("/"), dataset, revision, patience)


class Repository:
    """A dataset's repository at one commit, through the Hub's API."""

    def __init__(self, endpoint: str, dataset: str, revision: str, patience: Patience):
        self.endpoint, self.dataset, self.patience = endpoint, dataset, patience
        self.token = hub_token()
        url = f"{endpoint}/api/datasets/{dataset}/revision/{quote(revision, safe='')}?expand=sha"
        try:
            self.commit: str = self._json(url)[0]["sha"]
        except Refused as error:
            raise SourceError(f"dataset {dataset}: {self._why(error, revision)}") from None

    def _why(self, refused: Refused, revision: str) -> str:
        if refused.code == "RevisionNotFound":
            return f"has no revision {revision!r}; check --revision"
        if refused.code == "GatedRepo":
            return (
                f"is gated: ask for access at {self.endpoint}/datasets/{self.dataset}, then {LOGIN}"
            )
        if refused.status in (401, 404):
            return f"is not on {self.endpoint}, or is private; check --dataset, or {LOGIN}"
        return str(refused)

    def url(self, path: str) -> str:
        return f"{self.endpoint}/datasets/{self.dataset}/resolve/{self.commit}/{quote(path)}"

    def text(self, path: str) -> str:
        """A small file's content, "" where there is none of that name."""
        try:
            return self._get(self.url(path))[0].decode("utf-8", "replace")
        except Refused as error:
            if error.status != 404:
                raise
            return ""

    def tree(self, folder: str, is_recursive: bool = True) -> list[dict]:
        """All files below a folder of the repository, or those in it: {"path", "size", "lfs":
        {"oid"}, ...}."""
        base = f"{self.endpoint}/api/datasets/{self.dataset}/tree/{self.commit}/{quote(folder)}"
        base = base.rstrip("/")
        query: str = f"recursive={str(is_recursive).lower()}"
        entries: list[dict] = []
        while query:
            try:
                page, following = self._json(f"{base}?{query}")
            except Refused as error:
                if error.status != 404:
                    raise
                return []
            entries += page
            # only its cursor: behind a mirror the address of the next page can be another host's
            query = urlsplit(following).query
        return [entry for entry in entries if entry["type"] == "file"]

    def _json(self, url: str) -> tuple:
        """The answer, and the address of the next page or ""."""
        content, response = self._get(url)
        try:
            return json.loads(content), response.links.get("next", {}).get("url", "")
        except (ValueError, RecursionError):
            raise SourceError(f"{url}: the answer is not the Hub's; check HF_ENDPOINT") from None

    def _get(self, url: str) -> tuple[bytes, Any]:
        """(body, its response)."""
        import requests

        waiting = Waiting(f"dataset {self.dataset} on {self.endpoint}", self.patience)
        while True:
            try:
                response, _ = attempt(
                    url, home=self.endpoint, token=self.token, timeouts=waiting.timeouts()
                )
                return self._body(url, response), response
            except Fault as error:
                waiting.after(error)
            except requests.RequestException as error:
                waiting.after(Fault(cause(error)))

    @staticmethod
    def _body(url: str, response: Any) -> bytes:
        with contextlib.closing(response):
            body = bytearray()
            for block in response.iter_content(1 << 16):
                body += block
                if len(body) > LARGEST_ANSWER:
                    raise SourceError(f"{url}: answers with more than {LARGEST_ANSWER:,} bytes")
            if len(body) != int(response.headers.get("Content-Length", len(body))):
                raise Fault("the connection was closed early")  # urllib3 1 does not notice
        return bytes(body)


# ---- what to list: FineWeb has tens of thousands of files, its sample-10BT a dozen


def _front_matter(card: str) -> str:
    """The part of a dataset card that is data, with its fences; "" where there is none."""
    block = re.match(r"\s*(---[ \t]*\r?\n.*?\n---)[ \t]*(\r?\n|$)", card, re.DOTALL)
    return f"{block[1]}\n" if block else ""


def _plain_card(text: str) -> str:
    """A card as YAML that cannot go wrong: JSON, without aliases, and with the configurations'
    names as they are written (`config_name: no` is false to YAML). Raises UserError."""
    if not text.strip():
        return text
    body = text.strip().removeprefix("---").removesuffix("---")
    card = load_yaml(body, "its dataset card", largest=LARGEST_CARD)
    if not isinstance(card, dict):
        return ""
    written = load_yaml(body, "its dataset card", largest=LARGEST_CARD, as_text=True)
    for key in ("configs", "dataset_info"):
        for part, names in zip(_dicts(card.get(key)), _dicts(written.get(key)), strict=True):
            if part.get("config_name") is not None:
                part["config_name"] = names["config_name"]
    return _fenced(card) if text.startswith("---") else _fenced(card).strip("-\n")


def _dicts(value: Any) -> list[dict]:
    return [
        part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict)
    ]


def _fenced(card: Any) -> str:
    """The front matter of a README. JSON is YAML."""
    return f"---\n{json.dumps(card, default=str, skipkeys=True)}\n---\n"


def _config_of_card(cards: dict[str, str], name: str | None) -> dict | None:
    """A configuration's entry in the dataset card, if it alone tells where the files are."""
    if not name or cards[STANDALONE_CARD] or not cards[CARD]:
        return None
    configs = json.loads(cards[CARD].strip().strip("-")).get("configs")
    if not isinstance(configs, list):
        return None
    config = next((c for c in configs if isinstance(c, dict) and c.get("config_name") == name), {})
    simple = set(config) <= {"config_name", "data_files", "default"} and config.get("data_files")
    return config if simple and all(_patterns(config)) else None


def _patterns(config: dict) -> list[str]:
    """All patterns of a configuration's `data_files`; "" for what is not simply one within the
    repository."""

    def flat(value) -> list[str]:
        if isinstance(value, list):
            return [pattern for item in value for pattern in flat(item)]
        if isinstance(value, dict):
            return flat(value.get("path"))
        return [value if isinstance(value, str) and "://" not in value else ""]

    return flat(config["data_files"])


def _fixed_folder(pattern: str) -> str:
    """The folder that a pattern stays in: "sample/10BT" of "sample/10BT/*"."""
    folder: list[str] = []
    for part in pattern.split("/")[:-1]:
        if glob.has_magic(part) or "{" in part:
            break
        folder.append(part)
    return "/".join(part for part in folder if part != ".")


def _ask_datasets(
    dataset: str, cards: dict[str, str], listing: Collection[str], *, name: str | None, split: str
) -> tuple[str, list[str]]:
    """(configuration, paths of the split's files)."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve() / dataset.rpartition("/")[2]
        _lay_out(root, dict.fromkeys(listing, ""))
        _lay_out(root, cards)
        try:
            cache = str(Path(scratch) / "cache")
            builder = datasets.load_dataset_builder(str(root), name=name, cache_dir=cache)
        except Exception as error:  # it has no exception of its own for what its user got wrong
            what = _explain(error, str(root), name)
            archives = sorted(path for path in listing if path.lower().endswith(ARCHIVES))
            if archives and not any(what.startswith(word) for word in ("has ", "is made")):
                what = f"has archives ({archives[0]}), which are not looked into; unpack them"
                what += " and give the files with --source"
            raise SourceError(f"dataset {dataset}: {what}") from None
        splits = {str(key): files for key, files in (builder.config.data_files or {}).items()}
        if split not in splits:
            known = _names(splits, split)
            raise SourceError(
                f"dataset {dataset} has no split {split!r}; choose --split from {known}"
            )
        paths = [os.path.relpath(path, root).replace(os.sep, "/") for path in splits[split]]
    if elsewhere := [path for path in paths if path not in listing]:
        raise SourceError(
            f"dataset {dataset}: its card names {elsewhere[0]}, which is not in its repository"
        )
    return builder.config.name, paths


def _lay_out(root: Path, files: dict[str, str]) -> None:
    """Write files of a repository below `root`, the cards only where they have something in
    them."""
    folders = {os.path.dirname(path) for path in files}
    for folder in folders:
        if folder.startswith("/") or ".." in folder.split("/"):
            raise SourceError(f"the dataset has a folder named {folder!r}, which is not read")
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        # an empty card or list of infos would be read, and found wanting
        if text or path not in (CARD, STANDALONE_CARD, "dataset_infos.json"):
            with open(f"{root}/{path}", "w", encoding="utf-8") as f:
                f.write(text)


def _explain(error: Exception, root: str, name: str | None) -> str:
    import datasets

    try:
        configs = datasets.get_dataset_config_names(root)
    except Exception:  # then the first error says more
        configs = []
    if name is None and len(configs) > 1:
        return f"has several configurations; choose --name from {_names(configs)}"
    if name is not None and configs and name not in configs:
        return f"has no configuration {name!r}; choose --name from {_names(configs, name)}"
    if "script" in str(error):
        return "is made by a script, which is not run; try --revision refs/convert/parquet"
    return (
        " ".join(str(error).replace(root, "the repository").split())[:300] or type(error).__name__
    )


def _names(names: Iterable[str], wanted: str = "") -> str:
    """At most twelve names for a message, those like the wanted one first."""
    names = list(names)
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    ordered = close + [n for n in names if n not in close]
    return ", ".join(ordered[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
