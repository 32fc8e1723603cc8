"""The whole way: a video and a sentence in, moments out.

Joins the extractors and the grounding room, which never import each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmdist_e2e.extractors.networks import ExtractorSpec, SnippetNetwork, describe
from mmdist_e2e.store import FeatureStore, fast_digest
from mmdist_e2e.structures import Features, MmdistError, Moment
from mmdist_e2e.weights.registry import (
    DEFAULT_RGB_EXTRACTOR,
    ENTRIES,
    SHIPPED_MODEL,
    cache_folder,
)

if TYPE_CHECKING:
    from mmdist_e2e.grounding.checkpoint import GroundingModel

Progress = Callable[[float], None]
DEFAULT_TOP_K = 5


class Grounder:
    """A trained model and the extractors its features come from.

    Args:
        model: a loaded grounding checkpoint.
        device, precision: of the extractors; see SnippetNetwork.
        cache: folder of cached features; None computes them each time.
        extractor: name or folder of the extractor, where the model's own record of it is not
            enough (a folder of yours that is not in the registry).
    """

    def __init__(
        self,
        model: GroundingModel,
        *,
        device: str = "auto",
        precision: str = "auto",
        cache: Path | None = None,
        extractor: str | None = None,
    ) -> None:
        self.model = model
        self._device, self._precision = device, precision
        self._store = FeatureStore(cache) if cache is not None else None
        self._extractor = extractor
        self._networks: dict[str, SnippetNetwork] = {}

    def _spec(self, modality: str) -> ExtractorSpec:
        name = self._extractor or str(self.model.matters[modality].get("extractor"))
        if self._extractor is None and name not in ENTRIES:
            raise MmdistError(
                f"This model was trained on {name!r} features, which mmdist cannot extract by "
                f"name; give the extractor's folder, or features instead of a video."
            )
        return describe(name)

    def encode(self, video: str | Path, *, progress: Progress | None = None) -> dict[str, Features]:
        """Features of every modality that the model reads, from the cache where it has them.

        Raises MmdistError when the video cannot be decoded or the extractor cannot be had.
        """
        from mmdist_e2e.extractors.extract import extract_video
        from mmdist_e2e.extractors.video import Decoder

        path = Path(video)
        features: dict[str, Features] = {}
        source = fast_digest(path) if path.is_file() else {}
        # The digest in the id keeps apart clips of one name from different folders.
        video_id = f"{path.stem}-{source.get('digest', 'none')}"
        for modality in self.model.modalities:
            spec = self._spec(modality)
            if self._store is not None and self._store.up_to_date(
                video_id, modality, matters=spec.matters, source=source
            ):
                features[modality] = self._store.load(video_id, modality)
                continue
            network = self._networks.get(modality)
            if network is None:
                network = SnippetNetwork(spec, device=self._device, precision=self._precision)
                self._networks[modality] = network
            with Decoder() as decoder:
                features[modality] = extract_video(
                    path, network, decoder, source=source, progress=progress
                )
            if self._store is not None:
                self._store.save(video_id, features[modality])
        return features

    def ground(
        self,
        video: str | Path | Features | Mapping[str, Features],
        query: str,
        *,
        top_k: int = DEFAULT_TOP_K,
        progress: Progress | None = None,
    ) -> list[Moment]:
        """Answer a sentence with moments in seconds, best first.

        Args:
            video: a file, or features that `encode` or `extract` gave.
            query: the sentence.
            top_k: how many moments at most.

        Raises MmdistError for an unreadable video, features the model was not trained on, an
        empty query or one without a known word, or a top_k below 1.
        """
        if top_k < 1:
            raise MmdistError(f"top_k must be at least 1; got {top_k}.")
        self.model.check_query(query)  # before minutes of extraction
        if isinstance(video, Features):
            features: Mapping[str, Features] = {video.modality: video}
        elif isinstance(video, Mapping):
            features = video
        else:
            features = self.encode(video, progress=progress)
        return self.model.answer(features, query)[:top_k]


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    cache: str | Path | None = None,
    extractor: str | None = None,
) -> Grounder:
    """Load a grounding model; without a name the one that ships in the wheel.

    Args:
        model: a run's folder or checkpoint folder.
        cache: folder of cached features; by default the user's cache.

    Raises MmdistError when the folder is no checkpoint.
    """
    from mmdist_e2e.grounding.checkpoint import load_checkpoint

    loaded = load_checkpoint(Path(model) if model is not None else SHIPPED_MODEL)
    return Grounder(
        loaded,
        device=device,
        precision=precision,
        cache=Path(cache) if cache is not None else cache_folder() / "features",
        extractor=extractor,
    )


def extract(
    video: str | Path,
    *,
    extractor: str = DEFAULT_RGB_EXTRACTOR,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> Features:
    """Features of one video by one extractor, not cached.

    Raises MmdistError for an unknown extractor or a video that cannot be decoded.
    """
    from mmdist_e2e.extractors.extract import extract_video
    from mmdist_e2e.extractors.video import Decoder

    network = SnippetNetwork(describe(extractor), device=device, precision=precision)
    with Decoder() as decoder:
        return extract_video(Path(video), network, decoder, progress=progress)


def default_extractors(modalities: Sequence[str]) -> dict[str, str]:
    """The shipped extractor of each modality. Raises MmdistError where none ships yet."""
    names = {"rgb": DEFAULT_RGB_EXTRACTOR}
    missing = [modality for modality in modalities if modality not in names]
    if missing:
        raise MmdistError(
            f"No extractor for {', '.join(missing)} ships with this version; valid: "
            f"{', '.join(names)}."
        )
    return {modality: names[modality] for modality in modalities}
