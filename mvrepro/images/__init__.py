"""Face training sets in the formats that people have, behind one interface: formats.common.Source.

    open_images("ms1m/")           train.rec + train.idx: InsightFace RecordIO, without MXNet
    open_images("shards/")         *.tar of key.jpg + key.cls, as webdataset writes them
    open_images("people/")         people/NAME/….jpg
    read_bin("lfw.bin")            InsightFace pair sets, without unpickling more than bytes and booleans

Nothing of a set is held in memory but what finds an image; that is kept in the ignored folder .mvrepro,
so that the second time a set of millions opens at once.
"""

from mvrepro.images.folders import Folder, write_folder
from mvrepro.images.opening import open_images
from mvrepro.images.pairs import Pairs, read_bin, write_bin
from mvrepro.images.recordio import Records, write_rec
from mvrepro.images.source import Decoded, Renumbered, Source, Without, check_ids, decode
from mvrepro.images.tars import Tars, write_tars

__all__ = [
    "Decoded",
    "Folder",
    "Pairs",
    "Records",
    "Renumbered",
    "Source",
    "Tars",
    "Without",
    "check_ids",
    "decode",
    "open_images",
    "read_bin",
    "write_bin",
    "write_folder",
    "write_rec",
    "write_tars",
]
from mvrepro.images.small import Images, Pixels
