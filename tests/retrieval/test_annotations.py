# SPDX-License-Identifier: Apache-2.0
"""Data sets in the file layouts of CLIP4Clip and STOP, written small, and what is wrong with them."""

import builtins
import collections
import json
import os
import pickle
from pathlib import Path

import pytest

from retrieval.annotations import load
from retrieval.corpus import Video
from retrieval.errors import UsageError


def put(folder, **files):
    """Files by name (with _DOT_ for a dot): bytes, text, or what becomes JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("_DOT_", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def videos(folder, *names):
    """Empty files; nothing here opens them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def complaint(*arguments, **options):
    """Return what load says of these arguments: one line."""
    with pytest.raises(UsageError) as caught:
        load(*(str(each) if isinstance(each, Path) else each for each in arguments), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(split):
    """Captions by the id of their video."""
    by_id = collections.defaultdict(list)
    for owner, text in split.captions:
        by_id[split.videos[owner].id].append(text)
    return dict(by_id)


# -- MSR-VTT ----------------------------------------------------------------------------------------------------------

MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {"video_id": "video0", "split": "train", "url": "https://a?v=b"},
        {"video_id": "video1", "split": "train"},
        {"video_id": "video7", "split": "validate"},
        {"video_id": "video9", "split": "test"},
        {"video_id": "video8", "split": "test"},
    ],
    "sentences": [
        {"video_id": "video9", "caption": "a test", "sen_id": 1},
        {"video_id": "video0", "caption": "a dog runs"},
        {"video_id": "video1", "caption": "two cats"},
        {"video_id": "video0", "caption": " a dog is running "},
        {"video_id": "video77", "caption": "of no video"},
        {"video_id": "video8", "caption": "another test"},
        {"video_id": "video1", "caption": "  "},
        {"video_id": "video9", "caption": "a test"},
        {"video_id": "video7", "caption": "a validation"},
    ],
}


@pytest.fixture
def msrvtt(tmp_path):
    put(tmp_path, data_DOT_json=MSRVTT)
    videos(tmp_path / "v", *(f"video{n}.mp4" for n in (0, 1, 7, 8, 9)))
    return tmp_path / "data.json", tmp_path / "v"


def test_msrvtt_by_its_own_splits(msrvtt):
    splits = load("msrvtt", *map(str, msrvtt))
    assert [*splits] == ["train", "val"]
    train, val = splits["train"], splits["val"]
    assert (train.name, val.name) == ("train", "val")
    assert train.videos == tuple(Video(f"video{n}", str(msrvtt[1] / f"video{n}.mp4")) for n in (0, 1))
    assert train.captions == ((0, "a dog runs"), (0, "a dog is running"), (1, "two cats"))
    assert [video.id for video in val.videos] == ["video9", "video8"]
    assert val.captions == ((0, "a test"), (0, "a test"), (1, "another test"))  # one may be said twice
    assert train.missing == val.missing == ()


@pytest.mark.parametrize("name", ["validate", "val"])
def test_msrvtt_without_test_videos_evaluates_validation(msrvtt, name):
    data = MSRVTT | {"videos": [v | {"split": name} if v["split"] == "validate" else v for v in MSRVTT["videos"][:3]]}
    msrvtt[0].write_text(json.dumps(data))
    assert texts(load("msrvtt", *map(str, msrvtt))["val"]) == {"video7": ["a validation"]}


def test_msrvtt_csvs(msrvtt, tmp_path):
    put(
        tmp_path,
        train_DOT_csv="\ufeffvideo_id\r\nvideo1\r\nvideo9\r\nvideo1\r\nvideo55\r\n",
        val_DOT_csv="key,vid_key,video_id,sentence\r\nret0,msr8,video8,one thing\r\n"
        'ret1,msr0,video0,"quoted, with commas"\r\nret2,msr8,video8,another thing\r\nret3,msr7,video7,\r\n',
    )
    splits = load("msrvtt", *map(str, msrvtt), str(tmp_path / "train.csv"), str(tmp_path / "val.csv"))
    assert texts(splits["train"]) == {"video1": ["two cats"], "video9": ["a test", "a test"]}
    assert [video.id for video in splits["train"].videos] == ["video1", "video9"]
    assert splits["val"].captions == ((0, "one thing"), (0, "another thing"), (1, "quoted, with commas"))
    assert [video.id for video in splits["val"].videos] == ["video8", "video0"]
    assert splits["train"].missing == splits["val"].missing == ()


def test_only_what_is_wanted_is_read(msrvtt, tmp_path):
    put(tmp_path, val_DOT_csv="video_id,sentence\nvideo8,one thing\n")
    msrvtt[0].unlink()
    splits = load("msrvtt", *map(str, msrvtt), "nowhere.csv", str(tmp_path / "val.csv"), want=("val",))
    assert [*splits] == ["val"]
    assert texts(splits["val"]) == {"video8": ["one thing"]}
    assert "data.json (--data_path): no such file" in complaint(
        "msrvtt", *msrvtt, None, str(tmp_path / "val.csv"), want=("train",)
    )


def test_missing_videos(msrvtt):
    (msrvtt[1] / "video0.mp4").unlink()
    train = load("msrvtt", *map(str, msrvtt))["train"]
    assert train.missing == (str(msrvtt[1] / "video0.mp4"),)
    assert train.videos == (Video("video1", str(msrvtt[1] / "video1.mp4")),)
    assert train.captions == ((0, "two cats"),)


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["video9.webm"], "video9.webm"),
        (["a/b/video9.AVI", "c/other.mp4"], "a/b/video9.AVI"),
        (["video9.mkv", "z/video9.mp4"], "z/video9.mp4"),  # which of two doesn't depend on the order of a listing
        (["b/video9.mp4", "a/video9.mp4"], "a/video9.mp4"),
        (["video9.json", "video9.npy", "._video9.mp4", "video99.mp4", "video9.mov"], "video9.mov"),
    ],
)
def test_videos_are_found_by_name(msrvtt, tmp_path, files, taken):
    folder = videos(tmp_path / "w", "video8.mp4", *files)
    val = load("msrvtt", str(msrvtt[0]), str(folder), want=("val",))["val"]
    assert val.videos[0] == Video("video9", str(folder / taken))


def test_linked_folders_count_and_circles_end(msrvtt, tmp_path):
    try:
        os.symlink(msrvtt[1], videos(tmp_path / "w", "more/x.mp4") / "more/link")
        os.symlink(tmp_path / "w", tmp_path / "w/more/circle")
    except OSError:
        pytest.skip("no links here")
    val = load("msrvtt", str(msrvtt[0]), str(tmp_path / "w"), want=("val",))["val"]
    assert [video.path for video in val.videos] == [str(tmp_path / f"w/more/link/video{n}.mp4") for n in (9, 8)]


# -- the others -------------------------------------------------------------------------------------------------------

MSVD = {
    "a_1_5": [["a", "man", "sings"], ["someone", "sings"]],
    "-b_0_9": [["a", "cat"], []],
    "c_2_3": [["a", "panda"]],
    "d": [["of", "no", "list"]],
}


@pytest.fixture
def msvd(tmp_path):
    put(
        tmp_path / "data",
        train_list_DOT_txt="c_2_3\r\n",
        test_list_DOT_txt="-b_0_9\r\na_1_5\r\n\r\na_1_5\r\nnot_there\r\n",
        raw_captions=pickle.dumps(MSVD),
    )
    (tmp_path / "data/raw_captions").rename(tmp_path / "data/raw-captions.pkl")
    return tmp_path / "data", videos(tmp_path / "v", "a_1_5.avi", "-b_0_9.avi", "c_2_3.avi")


def test_msvd(msvd):
    splits = load("msvd", *map(str, msvd))
    assert texts(splits["train"]) == {"c_2_3": ["a panda"]}
    assert splits["val"].videos == (
        Video("-b_0_9", str(msvd[1] / "-b_0_9.avi")),
        Video("a_1_5", str(msvd[1] / "a_1_5.avi")),
    )
    assert splits["val"].captions == ((0, "a cat"), (1, "a man sings"), (1, "someone sings"))
    assert splits["val"].silent == ("not_there",), "named, not lost"


@pytest.mark.parametrize("listed", ["a_1_5", "a_1_5.avi", "a_1_5.AVI"])
@pytest.mark.parametrize("captioned", ["a_1_5", "a_1_5.avi"])
@pytest.mark.parametrize("there", ["a_1_5.avi", "a_1_5.mp4"])
def test_msvd_names_with_and_without_the_suffix(tmp_path, listed, captioned, there):
    put(tmp_path / "data", train_list_DOT_txt="c_2_3\n", test_list_DOT_txt=f"{listed}\n")
    (tmp_path / "data/raw-captions.pkl").write_bytes(pickle.dumps({captioned: [["a", "man"]], "c_2_3": [["a", "cat"]]}))
    folder = videos(tmp_path / "v", there, "c_2_3.avi")
    val = load("msvd", str(tmp_path / "data"), str(folder), want=("val",))["val"]
    assert val.captions == ((0, "a man"),)
    assert val.videos == (Video(listed, str(folder / there)),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        collections.OrderedDict,
        lambda data: collections.defaultdict(list, data),
        lambda data: {video: tuple(tuple(caption) for caption in captions) for video, captions in data.items()},
        lambda data: {video: [" ".join(caption) for caption in captions] for video, captions in data.items()},
    ],
)
def test_msvd_captions_pickled_in_other_ways(msvd, wrap, protocol):
    (msvd[0] / "raw-captions.pkl").write_bytes(pickle.dumps(wrap(MSVD), protocol))
    assert texts(load("msvd", *map(str, msvd))["val"])["a_1_5"] == ["a man sings", "someone sings"]


def test_msvd_captions_pickled_by_python_2(msvd):
    content = b"(dp0\nS'a_1_5'\np1\n(lp2\n(lp3\nS'caf\\xc3\\xa9'\np4\naVau lait\np5\naas."
    (msvd[0] / "raw-captions.pkl").write_bytes(content)
    assert texts(load("msvd", *map(str, msvd), want=("val",))["val"]) == {"a_1_5": ["café au lait"]}


class Runs:
    """A pickle of this runs code."""

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_nothing_in_a_pickle_is_run(msvd, tmp_path):
    Runs.path = tmp_path / "made"
    (msvd[0] / "raw-captions.pkl").write_bytes(pickle.dumps({"a_1_5": [Runs()]}))
    said = complaint("msvd", *msvd)
    assert "raw-captions.pkl (--data_path): holds " in said
    assert ".mkdir, which is no plain data, so it was not loaded; make it anew of dict, list and str" in said
    assert not Runs.path.exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "open", "object", "type", "print"])
@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
def test_a_pickle_may_not_ask_for_functions(msvd, module, name):
    assert hasattr(builtins, name)
    (msvd[0] / "raw-captions.pkl").write_bytes(b"c%s\n%s\n(S'1'\ntR." % (module.encode(), name.encode()))
    assert f"holds {module}.{name}, which is no plain data" in complaint("msvd", *msvd)


def test_vatex(tmp_path):
    put(
        tmp_path / "data",
        train_list_DOT_txt="t_000_010\n",
        test_list_DOT_txt="v_000_010\nw_000_010\n",
        ref_captions_DOT_json={"v_000_010": ["one", "two", ""], "w_000_010": ["three"], "t_000_010": ["four"]},
    )
    folder = videos(tmp_path / "v", "v_000_010.mp4", "deep/t_000_010.webm", "w_000_010.mp4")
    splits = load("vatex", str(tmp_path / "data"), str(folder))
    assert splits["val"].captions == ((0, "one"), (0, "two"), (1, "three"))
    assert splits["train"].videos == (Video("t_000_010", str(folder / "deep/t_000_010.webm")),)


DIDEMO = [
    {"video": "1@N00_a.avi", "description": "first", "times": [[0, 0]], "annotation_id": 1},
    {"video": "2@N00_b.mov", "description": "the other", "times": [[1, 1]]},
    {"video": "1@N00_a.avi", "description": " second ", "times": [[2, 3]]},
    {"video": "9@N00_x.avi", "description": "of no list", "times": [[2, 3]]},
]


def test_didemo(tmp_path):
    put(
        tmp_path / "data",
        train_list_DOT_txt="3@N00_c.3gp\n4@N00_d.MOV\n5@N00_e.wmv\n",
        train_data_DOT_json=[{"video": v, "description": v} for v in ("3@N00_c.3gp", "4@N00_d.MOV", "5@N00_e.wmv")],
        test_list_DOT_txt="2@N00_b.mov\n1@N00_a.avi\n1@N00_a.avi\n",
        test_data_DOT_json=DIDEMO,
    )
    # as they are, with a suffix behind, with another one instead
    folder = videos(tmp_path / "v", "1@N00_a.avi", "2@N00_b.mov.mp4", "3@N00_c.mp4", "4@N00_d.MOV", "4@N00_d.mp4")
    splits = load("didemo", str(tmp_path / "data"), str(folder))
    assert splits["val"].videos == (
        Video("2@N00_b.mov", str(folder / "2@N00_b.mov.mp4"), (0, 31)),
        Video("1@N00_a.avi", str(folder / "1@N00_a.avi"), (0, 31)),
    )
    assert splits["val"].captions == ((0, "the other"), (1, "first second"))
    assert [video.path for video in splits["train"].videos] == [
        str(folder / "3@N00_c.mp4"),
        str(folder / "4@N00_d.MOV"),
    ]
    assert splits["train"].missing == (str(folder / "5@N00_e.wmv"),)


ACTIVITY = {
    "v_a": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 60.81]],
        "sentences": ["A woman.", " She dances."],
    },
    "v_b": {"duration": 9, "timestamps": [[0, 2]], "sentences": [" Alone. "]},
    "v_of_no_list": {"duration": 9, "sentences": ["x"]},
}


@pytest.fixture
def activity(tmp_path):
    put(
        tmp_path / "data",
        train_ids_DOT_json=["v_b"],
        train_DOT_json=ACTIVITY,
        val_ids_DOT_json=["v_b", "v_without_captions", "v_a", "v_a"],
        val_1_DOT_json=ACTIVITY,
    )
    return tmp_path / "data", videos(tmp_path / "v", "a.mp4", "v_b.mkv")


def test_activity(activity):
    splits = load("activity", *map(str, activity))
    assert splits["val"].videos == (
        Video("b", str(activity[1] / "v_b.mkv"), (0, 9)),
        Video("a", str(activity[1] / "a.mp4"), (0, 83)),
    )
    assert splits["val"].captions == ((0, "Alone."), (1, "A woman. She dances."))
    assert texts(splits["train"]) == {"b": ["Alone."]}


@pytest.mark.parametrize("duration", ["0", "-1", "NaN", "Infinity"])
def test_activity_durations_of_no_use(activity, duration):
    (activity[0] / "val_1.json").write_text(f'{{"v_a": {{"duration": {duration}, "sentences": ["x"]}}}}')
    assert load("activity", *map(str, activity))["val"].videos == (Video("a", str(activity[1] / "a.mp4")),)


CLIP = "0001_American_Beauty_00.00.51.926-00.00.54.129"
TIMES = "00.00.51.926\t00.00.54.129\t00.00.51.926\t00.00.54.129"


@pytest.fixture
def lsmdc(tmp_path):
    put(
        tmp_path / "data",
        LSMDC16_annos_training_DOT_csv=f'{CLIP}\t{TIMES}\t"Yes, she says.\r\n{CLIP}\t{TIMES}\tShe nods, twice.\t\r\n',
        LSMDC16_challenge_1000_publictect_DOT_csv=f"1_B_00.1\t{TIMES}\tOne.\n\n1_C_00.2\t{TIMES}\tTwo.\n",
    )
    return tmp_path / "data", videos(tmp_path / "v", f"0001_American_Beauty/{CLIP}.avi", "1_B/1_B_00.1.mp4")


def test_lsmdc(lsmdc):
    splits = load("lsmdc", *map(str, lsmdc))
    assert splits["train"].videos == (Video(CLIP, str(lsmdc[1] / f"0001_American_Beauty/{CLIP}.avi")),)
    assert splits["train"].captions == ((0, '"Yes, she says.'), (0, "She nods, twice."))
    assert splits["val"].captions == ((0, "One."),)
    assert splits["val"].missing == (str(lsmdc[1] / "1_C_00.2.mp4"),)


@pytest.mark.parametrize("datatype", ["msvd", "activity", "lsmdc"])
def test_other_data_sets_ignore_csvs(datatype, request):
    """STOP's scripts give --train_csv and --val_csv with all of them."""
    paths = map(str, request.getfixturevalue(datatype))
    assert len(load(datatype, *paths, "nowhere.csv", "nowhere.csv")) == 2


# -- what can be wrong ------------------------------------------------------------------------------------------------


def test_unknown_data_set(tmp_path):
    assert "--datatype hmdb is none of msrvtt, msvd" in complaint("hmdb", tmp_path, tmp_path)


def test_features_path(msrvtt, tmp_path):
    assert "nowhere (--features_path): no such folder" in complaint("msrvtt", msrvtt[0], tmp_path / "nowhere")
    assert "data.json (--features_path): is a file; give the folder" in complaint("msrvtt", msrvtt[0], msrvtt[0])


@pytest.mark.parametrize(
    ("there", "said"), [([], "no videos at all are there"), (["x.mkv", "a.txt"], "there: 1 video like x.mkv")]
)
def test_no_video_of_a_split_is_there(msrvtt, tmp_path, there, said):
    (tmp_path / "w").mkdir()
    folder = videos(tmp_path / "w", *there)
    message = complaint("msrvtt", msrvtt[0], folder)
    assert message == (
        f"{folder} (--features_path), with the folders inside, has none of the 2 train videos that {msrvtt[0]} "
        f"(--data_path) names, such as video0.mp4 (or .avi .mkv .webm .mov …); {said}"
    )


@pytest.mark.parametrize("datatype", ["msvd", "vatex", "didemo", "activity", "lsmdc"])
def test_data_path_is_no_folder(tmp_path, datatype):
    path = put(tmp_path, x_DOT_json="{}") / "x.json"
    assert f"x.json (--data_path): is a file; for {datatype} it is a folder with " in complaint(
        datatype, path, tmp_path
    )
    gone = tmp_path / "gone"
    assert f"gone (--data_path): no such folder; for {datatype} it is" in complaint(datatype, gone, tmp_path)


@pytest.mark.parametrize(
    ("datatype", "name"),
    [
        ("msvd", "train_list.txt"),
        ("msvd", "test_list.txt"),
        ("msvd", "raw-captions.pkl"),
        ("activity", "train_ids.json"),
        ("activity", "val_1.json"),
        ("lsmdc", "LSMDC16_annos_training.csv"),
        ("lsmdc", "LSMDC16_challenge_1000_publictect.csv"),
    ],
)
def test_a_file_is_missing(request, datatype, name):
    data, folder = request.getfixturevalue(datatype)
    (data / name).unlink()
    message = complaint(datatype, data, folder)
    assert message.startswith(f"{data / name} (--data_path): no such file; for {datatype} it is a folder with ")
    assert name in message.partition("it is a folder with")[2]
    (data / name).mkdir()
    assert f"{data / name} (--data_path): is a folder" in complaint(datatype, data, folder)


def test_msrvtt_files_are_missing(msrvtt, tmp_path):
    assert "(--data_path): is a folder; for msrvtt it is the file MSRVTT_data.json" in complaint(
        "msrvtt", tmp_path, tmp_path
    )
    gone = str(tmp_path / "gone.csv")
    assert f"{gone} (--train_csv): no such file; it is a file like MSRVTT_train.9k.csv" in complaint(
        "msrvtt", *msrvtt, gone
    )
    assert f"{gone} (--val_csv): no such file; it is a file like MSRVTT_JSFUSION_test.csv" in complaint(
        "msrvtt", *msrvtt, None, gone
    )


def test_a_file_that_the_system_refuses(msrvtt):
    inside = msrvtt[0] / "of_a_file.json"
    assert "of_a_file.json (--data_path): can't be read: Not a directory" in complaint("msrvtt", inside, msrvtt[1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no JSON: Expecting value in line 1"),
        (
            '{"videos": [],\n"sentences": [\n{"video_id": "v",',
            "is no JSON: Expecting property name enclosed in double ",
        ),
        ("[" * 100_000, "nested too deeply"),
        (b'{"videos": "\xe9\xe8"}', "is no UTF-8 text (invalid continuation byte at byte 12); save it as UTF-8"),
        ([1, 2], "it is a list, not an object with 'sentences'"),
        ({"videos": [], "images": 3}, "it has no 'sentences'; found: 'videos', 'images'"),
        ({"sentences": []}, "it has no 'videos'; found: 'sentences'"),
        ({}, "it has no 'sentences'; found: nothing"),
        ({"videos": [], "sentences": {}}, "'sentences' of it is an object, not a list"),
        (
            MSRVTT | {"sentences": [{"video_id": "video0", "text": "x"}]},
            "entry 0 of 'sentences' has no 'caption'; found: ",
        ),
        (MSRVTT | {"sentences": [*MSRVTT["sentences"], None]}, "entry 9 of 'sentences' is null, not an object with "),
        (
            MSRVTT | {"sentences": [{"video_id": "video0", "caption": 5}]},
            "'caption' of entry 0 of 'sentences' is a number, not a string",
        ),
        (MSRVTT | {"videos": [{"video_id": "video0"}]}, "entry 0 of 'videos' has no 'split'; found: 'video_id'"),
        (
            MSRVTT | {"videos": [{"video_id": "v", "split": "train-7k"}, {"video_id": "w", "split": "test"}]},
            "none of its videos has the split train; found: test, train-7k; --train_csv names videos too",
        ),
        (
            MSRVTT | {"videos": MSRVTT["videos"][:2]},
            "has the split test or validate or val; found: train; --val_csv names",
        ),
        (MSRVTT | {"sentences": MSRVTT["sentences"][:1]}, "has no captions for the train split"),
    ],
)
def test_msrvtt_json(msrvtt, content, said):
    put(msrvtt[0].parent, data_DOT_json=content)
    message = complaint("msrvtt", *msrvtt)
    assert message.startswith(f"{msrvtt[0]} (--data_path)")
    assert said in message


def test_a_json_error_names_the_line(msrvtt):
    msrvtt[0].write_text('{"videos": [],\n"sentences": [\n{"video_id": "v"\n')
    assert "in line 4; is it all there?" in complaint("msrvtt", *msrvtt)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no column video_id in its first line; found: -"),
        ("id,sentence\nvideo8,x\n", "has no column video_id in its first line; found: id, sentence"),
        ("video_id;sentence\nvideo8;x\n", "has no column video_id in its first line; found: video_id;sentence"),
        ("video_id,caption\nvideo8,x\n", "has no column sentence in its first line; found: video_id, caption"),
        (
            "video_id,sentence\nvideo8,x\nvideo9,one, two\n",
            "line 3 has more fields than the first line; a sentence with ",
        ),
        ('video_id,sentence\nvideo8,x\nvideo9,"one\n', "is no CSV: unexpected end of data in line 3"),
        (b"video_id,sentence\nvideo8,caf\xe9\n", "is no UTF-8 text"),
        ("video_id,sentence\n", "has no captions for the val split"),
        ("video_id,sentence\nvideo8\n", "has no captions for the val split"),
        ("sentence,video_id\n,video8\n  ,video9\n", "has no captions for the val split"),
    ],
)
def test_msrvtt_csv(msrvtt, tmp_path, content, said):
    put(tmp_path, val_DOT_csv=content)
    message = complaint("msrvtt", *msrvtt, None, str(tmp_path / "val.csv"))
    assert message.startswith(f"{tmp_path / 'val.csv'} (--val_csv)")
    assert said in message


def test_msrvtt_csv_of_other_videos(msrvtt, tmp_path):
    put(tmp_path, train_DOT_csv="video_id\nvid0\n")
    message = complaint("msrvtt", *msrvtt, str(tmp_path / "train.csv"))
    assert "train.csv (--train_csv)" in message
    assert "data.json (--data_path) has no captions for the train split" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no pickle, or not all of one: it is truncated"),
        (b"no pickle", "is no pickle, or not all of one: "),
        (pickle.dumps(MSVD)[:-20], "is no pickle, or not all of one: "),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "is no pickle, or not all of one: "),
        (pickle.dumps([MSVD]), "it is a list, not an object"),
        (pickle.dumps(MSVD | {"a_1_5": "a man"}), "the value of 'a_1_5' is a string, not a list or a tuple"),
        (pickle.dumps(MSVD | {"a_1_5": [5]}), "a caption of 'a_1_5' is a number, not a string or a list or a tuple"),
        (pickle.dumps(MSVD | {"a_1_5": [[b"a"]]}), "holds _codecs.encode"),
        (pickle.dumps(MSVD | {"a_1_5": [[None]]}), "a word in a caption of 'a_1_5' is null, not a string"),
        (pickle.dumps(MSVD | {"a_1_5": [{"a"}]}), "a caption of 'a_1_5' is of type set, not a string"),
    ],
)
def test_msvd_pickle(msvd, content, said):
    if "_codecs" in said:  # as protocols below 3 write bytes
        content = pickle.dumps(MSVD | {"a_1_5": [[b"a"]]}, 2)
    (msvd[0] / "raw-captions.pkl").write_bytes(content)
    message = complaint("msvd", *msvd)
    assert message.startswith(f"{msvd[0] / 'raw-captions.pkl'} (--data_path): ")
    assert said in message


def test_lists_without_known_videos(msvd):
    (msvd[0] / "train_list.txt").write_text("x\ny\n")
    assert "train_list.txt (--data_path) with raw-captions.pkl has no captions for the train split" in complaint(
        "msvd", *msvd
    )
    (msvd[0] / "train_list.txt").write_bytes(b"caf\xe9\n")
    assert "train_list.txt (--data_path): is no UTF-8 text" in complaint("msvd", *msvd)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "it is a list, not an object"),
        ({"v_a": []}, "'v_a' is a list, not an object with 'sentences'"),
        ({"v_a": {"duration": 3, "captions": []}}, "'v_a' has no 'sentences'; found: 'duration', 'captions'"),
        ({"v_a": {"sentences": ["x"]}}, "'v_a' has no 'duration'; found: 'sentences'"),
        ({"v_a": {"duration": "3", "sentences": ["x"]}}, "'duration' of 'v_a' is a string, not a number"),
        ({"v_a": {"duration": 3, "sentences": "x"}}, "'sentences' of 'v_a' is a string, not a list"),
        ({"v_a": {"duration": 3, "sentences": [["x"]]}}, "a sentence of 'v_a' is a list, not a string"),
        ({"v_c": {}}, "has no captions for the val split"),
        ({"v_a": {"duration": 3, "sentences": ["", " "]}}, "has no captions for the val split"),
    ],
)
def test_activity_json(activity, content, said):
    put(activity[0], val_1_DOT_json=content)
    message = complaint("activity", *activity)
    assert "val_1.json" in message
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"), [({}, "it is an object, not a list"), ([5], "one of its ids is a number, not a string")]
)
def test_activity_ids(activity, content, said):
    put(activity[0], val_ids_DOT_json=content)
    assert f"val_ids.json (--data_path): {said}" in complaint("activity", *activity)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "it is an object, not a list"),
        ([{"video": "a.avi", "caption": "x"}], "entry 0 has no 'description'; found: 'video', 'caption'"),
        ([DIDEMO[0], {"description": "x"}], "entry 1 has no 'video'; found: 'description'"),
        ([DIDEMO[3]], "has no captions for the val split"),
    ],
)
def test_didemo_json(tmp_path, content, said):
    put(tmp_path / "data", test_list_DOT_txt="1@N00_a.avi\n", test_data_DOT_json=content)
    message = complaint("didemo", tmp_path / "data", tmp_path, want=("val",))
    assert "test_data.json" in message
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"a\t{TIMES}\tx\nb\t{TIMES}\n", "line 2 has 5 fields between tabs, not 6"),
        (f"a\t{TIMES}\tx\ty\n", "line 1 has 7 fields between tabs, not 6"),
        ("a,b,c,d,e,f\n", "line 1 has 1 fields between tabs, not 6"),
        (f"a\t{TIMES}\t{'x' * 200_000}\n", "field larger than field limit"),
        ("", "has no captions for the val split"),
    ],
)
def test_lsmdc_csv(lsmdc, content, said):
    put(lsmdc[0], LSMDC16_challenge_1000_publictect_DOT_csv=content)
    message = complaint("lsmdc", *lsmdc)
    assert message.startswith(f"{lsmdc[0] / 'LSMDC16_challenge_1000_publictect.csv'} (--data_path)")
    assert said in message


def test_messages_stay_short(msrvtt, tmp_path):
    """Someone may give a file of quite another kind."""
    put(tmp_path, val_DOT_csv=",".join(f'"column\n{n}"' for n in range(5000)))
    message = complaint("msrvtt", *msrvtt, None, str(tmp_path / "val.csv"))
    assert "has no column video_id" in message
    assert len(message) < 450 + len(str(tmp_path))
