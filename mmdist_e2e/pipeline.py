"""From a video and a query to an answer, and from a video to features.

Joins the extractors and the grounding model, which never import each other. Extractors are
imported only when features must be extracted.
"""

from __future__ import annotations

import os
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from mmdist_e2e.store import FeatureStore, digest_of, fast_digest
from mmdist_e2e.structures import Answer, Features, MmdistError, differences
from mmdist_e2e.weights.pull import model_folder
from mmdist_e2e.weights.registry import (
    DEFAULT_EXTRACTORS,
    ENTRIES,
    PCA,
    SHIPPED_MODEL,
    cache_folder,
    checkpoint_folder,
    pulled_file,
    read_config,
)

if TYPE_CHECKING:
    from mmdist_e2e.extractors.runner import SnippetNetwork
    from mmdist_e2e.grounding.answer import GroundingModel

Progress = Callable[[float], None] | None
Video = str | os.PathLike[str] | Features | Mapping[str, Features]
Queries = list[str] | tuple[str, ...]


def _expect(name: str, value: object, kinds: type | tuple[type, ...], valid: str) -> None:
    """Raises MmdistError for an argument of the wrong type."""
    if not isinstance(value, kinds):
        raise MmdistError(f"{name} must be {valid}; got {reprlib.repr(value)}.")


def _path(name: str, value: object) -> Path:
    _expect(name, value, (str, os.PathLike), "a path (str or Path)")
    return Path(value)  # type: ignore[arg-type]


class Grounder:
    """A trained model and the extractors that make its features.

    Args:
        model: a loaded grounding checkpoint, see `load`.
        device: of the model and the extractors: "auto", "cpu", "cuda" or "cuda:N".
        precision: of the extractors; see SnippetNetwork.
        cache: folder of cached features; None switches caching off.
        extractor: name or folder of the extractor, or several, one per modality. Needed for a
            model trained on features of an extractor that is not in the registry.
        features: folder that `mmdist extract` wrote; what fits there is not extracted again.

    Raises MmdistError for arguments of a wrong type, an unknown device, and an extractor of a
    modality that the model does not read.
    """

    def __init__(
        self,
        model: GroundingModel,
        *,
        device: str = "auto",
        precision: str = "auto",
        cache: str | Path | None = None,
        extractor: str | Path | Sequence[str | Path] | None = None,
        features: str | Path | None = None,
    ) -> None:
        import torch

        from mmdist_e2e.grounding.answer import GroundingModel

        _expect("model", model, GroundingModel, "a model that mmdist loaded; use mmdist_e2e.load")
        _expect("device", device, str, "a word like 'cpu' or 'cuda'")
        _expect("precision", precision, str, "a word like 'auto' or 'fp32'")
        if device == "auto" and not torch.cuda.is_available():
            device = "cpu"
        if device != "cpu":  # on a CPU, cached features are answered without the extractors
            from mmdist_e2e.extractors.runner import resolve_device

            device = resolve_device(device)
        self.model, self._device, self._precision = model, device, precision
        try:
            model.model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise MmdistError(f"The model cannot run on {device!r}: {error}") from error
        self._store = FeatureStore(_path("cache", cache)) if cache is not None else None
        self._extracted = None if features is None else FeatureStore(_path("features", features))
        self._warned = False
        self._given: dict[str, str] = {}
        given = [extractor] if isinstance(extractor, str | os.PathLike) else extractor or ()
        _expect("extractor", given, (list, tuple), "a name or folder, or a list of them")
        for name in (str(_path("extractor", each)) for each in given):
            modality = str(read_config(checkpoint_folder(name)).get("modality"))
            if modality not in model.modalities:
                raise MmdistError(
                    f"The extractor {name!r} gives {modality}, and this model reads "
                    f"{', '.join(model.modalities)}."
                )
            self._given[modality] = name
        self._networks: dict[str, SnippetNetwork] = {}

    def _network(self, modality: str) -> SnippetNetwork:
        """The extractor of a modality, with the settings that made the model's features."""
        from mmdist_e2e.extractors.profiles import describe
        from mmdist_e2e.extractors.runner import SnippetNetwork

        if modality in self._networks:
            return self._networks[modality]
        matters = self.model.matters[modality]
        name = self._given.get(modality, str(matters.get("extractor")))
        if modality not in self._given and name not in ENTRIES:
            raise MmdistError(
                f"This model was trained on {name!r} features, which mmdist cannot extract by "
                f"name; give the extractor's folder, or features instead of a video."
            )
        pca = pulled_file(PCA) if "pca" in matters else None
        chosen = {key: matters[key] for key in ("mode", "fps_policy", "layer") if key in matters}
        spec = describe(name, **chosen, pca=pca)
        if unlike := differences(matters, spec.matters):
            raise MmdistError(
                f"The extractor {name!r} does not make the {modality} features that this model "
                f"needs: {'; '.join(unlike)}; give the extractor that the model was trained with."
            )
        network = SnippetNetwork(spec, device=self._device, precision=self._precision)
        return self._networks.setdefault(modality, network)

    def encode(self, video: str | Path, *, progress: Progress = None) -> dict[str, Features]:
        """Features of every modality that the model reads, from where they are stored already.

        Missing ones are extracted in one pass. Raises MmdistError when the video cannot be
        decoded or an extractor is not available.
        """
        path = _path("video", video)
        source: dict[str, Any] = {}
        with suppress(OSError):  # the decoder says what is wrong
            source = fast_digest(path) if path.is_file() else {}
        found = {m: self._stored(m, path, source) for m in self.model.modalities}
        missing = [modality for modality, stored in found.items() if stored is None]
        made: dict[str, Features] = {}
        if missing:
            from mmdist_e2e.extractors.extract import extract_video

            if progress is not None:
                progress(0.0)
            networks = [self._network(modality) for modality in missing]
            made = extract_video(path, networks, source=source, progress=progress)
            self._keep(made, source)
        return {m: stored or made[m] for m, stored in found.items()}

    def _cache_id(self, modality: str, source: Mapping[str, Any]) -> str:
        """Digests of the video and of how features are made, so that models share a cache."""
        return f"{source['digest']}-{digest_of(self.model.matters[modality])[:16]}"

    def _stored(self, modality: str, path: Path, source: Mapping[str, Any]) -> Features | None:
        """Features that were made in this way from this video; None where they must be made."""
        if not source:
            return None
        places = [(self._store, self._cache_id(modality, source))] if self._store else []
        if self._extracted:
            parts = path.absolute().with_suffix("").parts  # an id is the path below some folder
            places += [(self._extracted, "/".join(parts[i:])) for i in range(1, len(parts))]
        for store, video in places:
            try:
                features = store.load(video, modality)
            except Exception:  # noqa: S112 - missing, or damaged: that may raise anything
                continue
            made = features.provenance
            same = made.matters == self.model.matters[modality] and made.source == source
            if same and features.modality == modality:
                return features
        return None

    def _keep(self, made: Mapping[str, Features], source: Mapping[str, Any]) -> None:
        """Write features to the cache; where that fails, warn once."""
        if self._store is None or not source:
            return
        try:
            for modality, features in made.items():
                self._store.save(self._cache_id(modality, source), features)
        except (MmdistError, OSError) as error:
            if not self._warned:
                reason = getattr(error.__cause__ or error, "strerror", None) or error
                warnings.warn(
                    f"The cache folder {self._store.root} cannot be written ({reason}), so the "
                    f"next query extracts these features again; choose a writable cache folder.",
                    stacklevel=2,
                )
            self._warned = True

    @overload
    def ground(
        self, video: Video, query: str, *, top_k: int = ..., progress: Progress = ...
    ) -> Answer: ...
    @overload
    def ground(
        self, video: Video, query: Queries, *, top_k: int = ..., progress: Progress = ...
    ) -> list[Answer]: ...
    def ground(
        self, video: Video, query: str | Queries, *, top_k: int = 5, progress: Progress = None
    ) -> Answer | list[Answer]:
        """Answer a query with moments in seconds, best first.

        Args:
            video: a file, or features from `encode` or `extract`.
            query: a sentence, or several: they get a list of answers, and the video is read once.
            top_k: maximum number of moments.
            progress: called with the fraction of the video that was read, 0 to 1.

        Raises MmdistError for an unreadable video, features that the model was not trained on, an
        empty query or one without a known word, and arguments of a wrong type. All queries are
        checked before the video is read.
        """
        _expect("top_k", top_k, Integral, "a whole number of at least 1")
        if isinstance(top_k, bool) or top_k < 1:
            raise MmdistError(f"top_k must be at least 1; got {top_k}.")
        queries = self._queries(query)
        name = ""
        if isinstance(video, Features):
            features: Mapping[str, Features] = {video.modality: video}
        elif isinstance(video, Mapping):
            features = video
            for key, value in video.items():
                _expect(f"The {key} features", value, Features, "Features")
                if value.modality != key:
                    raise MmdistError(f"The features given as {key!r} are {value.modality}.")
        else:
            features = self.encode(_path("video", video), progress=progress)
            name = os.fspath(video)
        model = self.model
        answers = [
            Answer(
                video=name,
                query=text,
                moments=tuple(model.answer(features, text)[: int(top_k)]),
                duration_seconds=float(features[model.modalities[0]].duration_seconds),
                unknown_words=tuple(model.vocabulary.unread(text)),
                model=model.name,
                trained_on=model.trained_on,
                warning=model.warning,
            )
            for text in queries
        ]
        return answers[0] if isinstance(query, str) else answers

    def _queries(self, query: object) -> list[str]:
        """One or several queries as a list. Raises MmdistError, naming a bad one by its number."""
        _expect("query", query, Iterable, "a sentence, or a list of sentences")
        queries = [query] if isinstance(query, str) else list(query)  # type: ignore[call-overload]
        if not queries:
            raise MmdistError("There is no query; give at least one sentence.")
        for number, text in enumerate(queries, start=1):
            _expect("query", text, str, "a sentence, or a list of sentences")
            try:
                self.model.check_query(text)
            except MmdistError as error:
                if len(queries) == 1:
                    raise
                raise MmdistError(f"Query {number} of {len(queries)}: {error}") from error
        return queries


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    cache: str | Path | Literal[True] | None = True,
    extractor: str | Path | Sequence[str | Path] | None = None,
    features: str | Path | None = None,
) -> Grounder:
    """Load a grounding model; by default the shipped one.

    Args:
        model: folder of a run, or a name; a public model is downloaded on first use.
        cache: folder of cached features; True for the user's cache folder, None for no caching.
        device, precision, extractor, features: see Grounder.

    Raises MmdistError for an unknown name, a failed download, no checkpoint, and as Grounder.
    """
    from mmdist_e2e.grounding.checkpoint import load_checkpoint

    folder = SHIPPED_MODEL if model is None else _path("model", model)
    if not folder.is_dir():
        folder = model_folder(str(folder))
    loaded = load_checkpoint(folder)
    if cache is True:
        cache = cache_folder() / "features"
    return Grounder(
        loaded,
        device=device,
        precision=precision,
        cache=cache,
        extractor=extractor,
        features=features,
    )


def extract(
    video: str | Path,
    *,
    extractor: str | Path = DEFAULT_EXTRACTORS["rgb"],
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = None,
) -> Features:
    """Features of one video by one extractor, not cached.

    Raises MmdistError for an unknown extractor or a video that cannot be decoded.
    """
    from mmdist_e2e.extractors.extract import extract_video
    from mmdist_e2e.extractors.profiles import describe
    from mmdist_e2e.extractors.runner import SnippetNetwork

    path, name = _path("video", video), str(_path("extractor", extractor))
    _expect("device", device, str, "a word like 'cpu' or 'cuda'")
    network = SnippetNetwork(describe(name), device=device, precision=precision)
    (features,) = extract_video(path, [network], progress=progress).values()
    return features
