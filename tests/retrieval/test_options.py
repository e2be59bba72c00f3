# SPDX-License-Identifier: Apache-2.0
"""The command line of examples/stop_retrieval: STOP's flags, their defaults, and what is wrong with others."""

import shlex

import pytest
import stoptome_kernels as stk

from retrieval import flags, options
from retrieval.errors import UsageError

ISSUED = shlex.split("""
    --do_train 1 --data_path data/MSRVTT_data.json --features_path data/MSRVTT_Videos --output_dir output/tome_msrvtt
    --max_words 32 --max_frames 12 --batch_size 128 --lr 1e-4 --epochs 5
    --tome_r 2 --tome_prop_attn --pretrained_clip_name "ViT-B/32" --sim_header "meanP" --temporal_prompt "DGL"
""")

# as STOP's scripts/msrvtt.sh calls its main.py, with paths filled in
UPSTREAM = shlex.split("""
    --do_train 1 --do_eval 0 --num_thread_reader 8 --epochs 5 --batch_size 32 --n_display 50
    --train_csv d/MSRVTT_train.9k.csv --val_csv d/MSRVTT_JSFUSION_test.csv --data_path d/MSRVTT_data.json
    --features_path d/MSRVTT_resized --output_dir logs/x --optim AdamW --lr 1e-3 --coef_lr 5e-4 --wd 0.2 --max_words 32
    --max_frames 12 --batch_size_val 16 --datatype msrvtt --expand_msrvtt_sentences --feature_framerate 3
    --freeze_layer_num 12 --slice_framepos 2 --loose_type --linear_patch 2d --sim_header meanP
    --pretrained_clip_name ViT-B/32 --precision amp --init_method tcp://127.0.0.1:6010 --pretrained_dir w
    --freeze_clip 1 --time_embedding 0 --resume None --load_from_pretrained 0
    --shared_latent_space transformer --temporal_prompt group2-2
""")


def read(*argv: str, run=None):
    args = options.complete(options.read(["--output_dir", "o", *argv]), run)
    args.world = 1
    return args


def test_the_command_of_the_readme():
    args = options.complete(options.read(ISSUED))
    assert (args.do_train, args.do_eval, args.datatype) == (True, False, "msrvtt")
    assert (args.batch_size, args.lr, args.epochs, args.max_frames) == (128, 1e-4, 5, 12)
    assert options.tome_config(args) == stk.ToMeConfig(2)
    assert args.notes == []


def test_the_command_of_stops_script():
    args = options.complete(options.read(UPSTREAM))
    assert (args.coef_lr, args.freeze_clip, args.temporal_prompt, args.precision) == (5e-4, True, "group2-2", "amp")
    ignored = [note.split()[0] for note in args.notes]
    assert ignored == [
        "--freeze_layer_num", "--loose_type", "--linear_patch", "--init_method", "--time_embedding",
        "--load_from_pretrained",
    ]  # fmt: skip


def test_every_flag_of_stops_parser_is_known():
    """The names in upstream's params.py and scripts; a new one here must be decided on."""
    upstream = shlex.split("""
        do_pretrain do_train do_eval inference_speed_test debug data_dir lmdb_dataset save_feature_path train_csv
        val_csv data_path features_path num_thread_reader epochs batch_size batch_size_val lr lr_decay coef_lr beta1
        beta2 eps wd n_display video_dim seed max_words max_frames feature_framerate margin hard_negative_rate
        negative_weighting n_pair output_dir resume load_from_pretrained cross_model init_model do_lower_case optim
        warmup_proportion gradient_accumulation_steps clip_grad_norm cache_dir task_type datatype
        use_mil sampled_use_mil text_num_hidden_layers visual_num_hidden_layers cross_num_hidden_layers loose_type
        expand_msrvtt_sentences train_frame_order eval_frame_order freeze_layer_num slice_framepos linear_patch
        sim_header pretrained_clip_name
        pretrained_dir dist_backend world_size local_rank init_method dp multigpu gpu n_gpu use-bn-sync remote precision
        freeze_clip temperature_new time_embedding camoe_dsl pre_norm tfm_heads tfm_layers shared_latent_space lora
        text_prompt_length local_each_frame_prompt_length global_visual_prompt_length unified_transformer_layers
        visual_output_type temporal_prompt unified_prompt_layers
    """)
    known = flags.parser()._option_string_actions
    assert [name for name in upstream if f"--{name}" not in known] == []


def test_nothing_but_a_folder_means_synthetic_videos():
    args = read()
    assert args.datatype == "synthetic"
    assert args.do_train
    assert args.pretrained_clip_name == "tiny"
    assert all(getattr(args, name) is not None for name in flags.DEFAULTS)
    assert options.tome_config(args).prop_attn is not False
    assert options.tome_config(args).off


def test_an_ignored_flag_is_said_once():
    args = read("--n_pair", "1", "--n_pair", "1", "--use_mil")
    assert args.notes == [
        "--n_pair is ignored: STOP's loss is cross-entropy", "--use_mil is ignored: STOP's loss is cross-entropy"
    ]  # fmt: skip
    assert "BertAdam" in read("--optim", "BertAdam").notes[0]
    assert read("--precision", "fp16").precision == "amp"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tome"], "--tome is no flag of this program"),
        (["--batch_szie", "4"], "did you mean --batch_size?"),
        (["--batch_size", "0"], "--batch_size: must be an integer of 1 or more, got '0'"),
        (["--max_words", "1"], "--max_words: must be an integer of 2 or more"),
        (["--lr", "fast"], "--lr: must be a number, 0 or more, got 'fast'"),
        (["--lr", "nan"], "--lr: must be a number, 0 or more"),
        (["--warmup_proportion", "2"], "must be a number, from 0 to 1"),
        (["--datatype", "imagenet"], "--datatype: invalid choice"),
        (["--data_path", "x.json"], "--datatype msrvtt needs --features_path"),
        (["--datatype", "vatex", "--features_path", "x"], "--datatype vatex needs --data_path"),
        (["--datatype", "synthetic", "--data_path", "x"], "leave out --data_path"),
        (["--do_train", "0"], "nothing to do"),
        (["--do_train", "maybe"], "--do_train: must be 0 or 1"),
        (["--do_eval", "--resume", "auto"], "--resume goes on with a training"),
        (["--resume", "x", "--init_model", "x"], "--resume FILE and --init_model"),
        (["--do_train", "1", "--query", "x"], "--query after a training needs --index"),
        (["--do_train", "1", "--fsdp", "--index"], "--fsdp in one call"),
        (["--query", " "], "--query needs a text"),
        (["--sim_header", "seqTransf"], "--sim_header seqTransf"),
        (["--batch_size", "10", "--gradient_accumulation_steps", "4"], "no multiple of --gradient_accumulation_steps"),
        (["--tome_preset", "memory", "--tome_r", "2"], "--tome_preset memory and --tome_r"),
        (["--tome_preset", "memory", "--no-tome_prop_attn"], "--tome_preset memory and --tome_prop_attn"),
    ],
)
def test_bad_flags_are_said_in_one_line(argv, said):
    with pytest.raises(UsageError) as caught:
        read(*argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_token_merging_flags_and_presets():
    args = read("--tome_r", "4", "--no-tome_prop_attn", "--tome_trace_source", "--merge_layers", "3-6",
                "--merge_frame_nums", "2-3", "--merge_token_proportions", "10-5", "--frame_pos", "1")  # fmt: skip
    assert options.tome_config(args) == stk.ToMeConfig(4, True, False, (3, 6), (2, 3), (10, 5), 1)
    preset = options.tome_config(read("--tome_preset", "accuracy", "--tome_trace_source"))
    assert preset == stk.ToMeConfig(1, True, True, (6, 9), (2, 2), (5, 5), 1)
    with pytest.raises(UsageError, match="merge_frame_nums"):
        options.tome_config(read("--tome_r", "2", "--merge_layers", "3"))


def test_what_is_evaluated_has_the_settings_it_was_trained_with():
    run = options.settings(read("--max_frames", "6", "--tome_r", "3", "--merge_layers", "1", "--merge_frame_nums", "2",
                                "--merge_token_proportions", "5-5", "--lr", "0.5"))  # fmt: skip
    args = read("--do_eval", run=run)
    assert (args.max_frames, args.tome_r, args.merge_layers, args.datatype) == (6, 3, (1,), "synthetic")
    assert args.lr != 0.5
    assert (args.lr, args.merge_token_proportions) == (read().lr, (5, 5))
    # the flags of merging are one setting
    assert options.tome_config(read("--do_eval", "--tome_r", "4", run=run)) == stk.ToMeConfig(4)
    assert options.tome_config(read("--do_eval", "--tome_r", "0", run=run)).off
    off = options.tome_config(read("--do_eval", "--no-tome_prop_attn", run=run))
    assert off == stk.ToMeConfig(3, False, False, (1,), (2,), (5, 5))
    preset = options.settings(read("--tome_preset", "accuracy"))
    assert options.tome_config(read("--do_eval", run=preset)) == stk.ToMeConfig.preset("accuracy")
    assert options.tome_config(read("--do_eval", "--tome_r", "4", run=preset)) == stk.ToMeConfig(4)
    assert options.tome_config(read("--do_eval", "--tome_preset", "training", run=run)) == stk.ToMeConfig(2)


def test_what_is_evaluated_is_what_was_evaluated_in_training():
    run = options.settings(read("--data_path", "a.json", "--features_path", "v", "--val_csv", "1k.csv"))
    args = read("--do_eval", run=run)
    assert (args.datatype, args.data_path, args.val_csv) == ("msrvtt", "a.json", "1k.csv")
    args = read("--do_eval", "--features_path", "w", run=run)
    assert (args.features_path, args.val_csv) == ("w", "1k.csv")
    args = read("--do_eval", "--data_path", "a.json", "--features_path", "v", run=options.settings(read()))
    given = ("--datatype", "msrvtt", "--data_path", "a.json", "--features_path", "v")
    assert read("--do_eval", *given, run=options.settings(read())).datatype == "msrvtt"
    assert args.datatype == "msrvtt", "a model of synthetic videos on others"


def test_frames_are_cached_only_where_they_are_taken_in_order():
    assert read().cache_frames
    assert not read("--eval_frame_order", "1").cache_frames
    with pytest.raises(UsageError, match="--cache_frames 1 goes with"):
        read("--cache_frames", "1", "--slice_framepos", "0")


def test_a_run_goes_on_as_it_was_begun():
    run = options.settings(read("--lr", "0.5", "--num_thread_reader", "3"))
    args = options.read(["--output_dir", "o", "--resume", "auto"])
    args.world = 1
    options.adopt(args, run, "ckpt")
    assert (args.lr, args.num_thread_reader, args.resume) == (0.5, 3, "auto")
    args = options.read(["--output_dir", "o", "--resume", "auto", "--num_thread_reader", "0", "--lr", "0.5"])
    args.world = 1
    options.adopt(args, run, "ckpt")
    assert args.num_thread_reader == 0
    args = options.read(["--output_dir", "o", "--resume", "auto", "--lr", "0.25"])
    args.world = 1
    with pytest.raises(UsageError, match=r"--lr is 0\.25, but ckpt was trained with 0\.5"):
        options.adopt(args, run, "ckpt")


def test_help_tells_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        flags.parser().parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for title in ("what to do", "data", "model", "token merging (ToMe)", "training", "evaluation"):
        assert f" {title}: --" in said
    assert "videos of one process in one step (default: 32; synthetic: 64)" in said
    assert "low-rank branch beside the MLPs (default: on; synthetic: off)" in said
    assert "order and dropout (default: 42)" in said
    assert "in each process that decodes (default: off; synthetic: on)" in said
    assert "0: ordinary, 1: reversed, 2: shuffled (default: 0)" in said
    assert "--inference_speed_test" not in said, "what is ignored is not offered"
    for action in flags.parser()._actions:
        assert action.help, f"{action.dest} says nothing"


@pytest.mark.parametrize(
    ("text", "sweep"), [("0,2,4", (0, 2, 4)), ("4,2,4,inference", (4, 2, "inference")), ("memory,1", ("memory", 1))]
)
def test_several_r_are_compared(text, sweep):
    args = read("--do_eval", "--tome_r", text)
    assert (args.sweep, args.tome_r) == (sweep, 0)
    assert "sweep" not in options.settings(args), "no setting of a run"
    assert read("--do_eval", "--tome_r", "8").sweep == ()
