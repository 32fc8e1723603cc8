"""The whole way: a video and a sentence in, moments out.

Joins the extractors and the grounding room, which never import each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmdist_e2e.extractors.profiles import ExtractorSpec, describe
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.store import FeatureStore, fast_digest
from mmdist_e2e.structures import Features, MmdistError, Moment
from mmdist_e2e.weights.registry import (
    DEFAULT_RGB_EXTRACTOR,
    ENTRIES,
    SHIPPED_MODEL,
    cache_folder,
    checkpoint_folder,
    read_config,
)

if TYPE_CHECKING:
    from mmdist_e2e.grounding.answer import GroundingModel

Progress = Callable[[float], None]
DEFAULT_TOP_K = 5


class Grounder:
    """A trained model and the extractors its features come from.

    Args:
        model: a loaded grounding checkpoint.
        device, precision: of the extractors; see SnippetNetwork.
        cache: folder of cached features; None computes them each time.
        extractor: name or folder of the extractor, or several, one a modality, where the model's
            own record is not enough (a folder of yours that is not in the registry).

    Raises MmdistError for an extractor of a modality that the model does not read.
    """

    def __init__(
        self,
        model: GroundingModel,
        *,
        device: str = "auto",
        precision: str = "auto",
        cache: Path | None = None,
        extractor: str | Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self._device, self._precision = device, precision
        self._store = FeatureStore(cache) if cache is not None else None
        self._given: dict[str, str] = {}
        for name in [extractor] if isinstance(extractor, str) else extractor or ():
            modality = str(read_config(checkpoint_folder(name)).get("modality"))
            if modality not in model.modalities:
                raise MmdistError(
                    f"The extractor {name!r} gives {modality}, and this model reads "
                    f"{', '.join(model.modalities)}."
                )
            self._given[modality] = name
        self._networks: dict[str, SnippetNetwork] = {}

    def _spec(self, modality: str) -> ExtractorSpec:
        """The extractor of a modality, run as the model's features were."""
        matters = self.model.matters[modality]
        name = self._given.get(modality, str(matters.get("extractor")))
        if modality not in self._given and name not in ENTRIES:
            raise MmdistError(
                f"This model was trained on {name!r} features, which mmdist cannot extract by "
                f"name; give the extractor's folder, or features instead of a video."
            )
        if "pca" in matters:
            raise MmdistError(
                f"This model reads {modality} features that a PCA reduced; make them with "
                f"mmdist extract --pca, and give features instead of a video."
            )
        return describe(
            name,
            mode=matters.get("mode", "windows"),
            fps_policy=matters.get("fps_policy", "ceiling"),
            layer=matters.get("layer"),
        )

    def encode(self, video: str | Path, *, progress: Progress | None = None) -> dict[str, Features]:
        """Features of every modality that the model reads, from the cache where it has them.

        What is missing is extracted in one pass. Raises MmdistError when the video cannot be
        decoded or an extractor cannot be had.
        """
        from mmdist_e2e.extractors.extract import extract_video
        from mmdist_e2e.extractors.video.reader import Decoder

        path = Path(video)
        features: dict[str, Features] = {}
        missing: list[SnippetNetwork] = []
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
            if modality not in self._networks:
                self._networks[modality] = SnippetNetwork(
                    spec, device=self._device, precision=self._precision
                )
            missing.append(self._networks[modality])
        if missing:
            with Decoder() as decoder:
                made = extract_video(path, missing, decoder, source=source, progress=progress)
            for modality, extracted in made.items():
                features[modality] = extracted
                if self._store is not None:
                    self._store.save(video_id, extracted)
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
    extractor: str | Sequence[str] | None = None,
) -> Grounder:
    """Load a grounding model; without a name the one that ships in the wheel.

    Args:
        model: a run's folder or checkpoint folder.
        cache: folder of cached features; by default the user's cache.
        device, precision, extractor: see Grounder.

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
    from mmdist_e2e.extractors.video.reader import Decoder

    network = SnippetNetwork(describe(extractor), device=device, precision=precision)
    with Decoder() as decoder:
        (features,) = extract_video(Path(video), [network], decoder, progress=progress).values()
    return features


def default_extractors(modalities: Sequence[str]) -> dict[str, str]:
    """The shipped extractor of each modality, the first in the registry where there are several.

    Raises MmdistError where none ships.
    """
    shipped: dict[str, str] = {}
    for entry in ENTRIES.values():
        if entry.kind == "shipped":
            config = read_config(checkpoint_folder(entry.name))
            shipped.setdefault(str(config["modality"]), entry.name)
    missing = [modality for modality in modalities if modality not in shipped]
    if missing:
        raise MmdistError(
            f"No extractor of {', '.join(missing)} ships with this version; name one with "
            f"--extractor, or take what ships: {', '.join(shipped)}."
        )
    return {modality: shipped[modality] for modality in modalities}
