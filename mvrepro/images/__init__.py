"""Sets of faces in the formats that people have, and in memory, behind one protocol: Images.

    open_images("ms1m/")           train.rec + train.idx: InsightFace RecordIO, without MXNet
    open_images("shards/")         *.tar of key.jpg + key.cls, as webdataset writes them
    open_images("people/")         people/NAME/….jpg
    read_bin("lfw.bin")            InsightFace pair sets, without unpickling more than bytes and booleans
    small.orl(32)                  what the profiles train on and test with: Pixels; also .digits()
    photographs.lfw(32)            also .cfp, .celeba
    archives.archive("fiw", 32)    further people to train on

Nothing of an encoded set is held in memory but what finds an image; that is kept in the ignored folder .mvrepro,
so that the second time a set of millions opens at once.
"""

from mvrepro.images.folders import Files, Folder, write_folder
from mvrepro.images.opening import open_images
from mvrepro.images.pairs import Pairs, read_bin, write_bin
from mvrepro.images.recordio import Records, write_rec
from mvrepro.images.source import Encoded, Images, Memory, Pixels, check_ids, decode
from mvrepro.images.tars import Tars, write_tars

__all__ = [
    "Encoded", "Files", "Folder", "Images", "Memory", "Pairs", "Pixels", "Records", "Tars", "check_ids", "decode",
    "open_images", "read_bin", "write_bin", "write_folder", "write_rec", "write_tars",
]  # fmt: skip
