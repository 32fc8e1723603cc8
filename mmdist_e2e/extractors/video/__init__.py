"""Video in and out: the only room that knows decord and PyAV."""

from mmdist_e2e.extractors.video.reader import Decoder as Decoder
from mmdist_e2e.extractors.video.writer import write_video as write_video
