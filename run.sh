#!/usr/bin/env bash
# The commands of this project:
#
#   ./run.sh demo            the whole pipeline on a small rendered dataset, ending in a table
#   ./run.sh test            linter and all tests, 10 to 18 minutes on two CPU cores
#   ./run.sh test --quick    linter and the tests that are not marked slow, 1 to 4 minutes
#   ./run.sh test tests/test_losses.py -k lsro    what else is given goes to pytest
#
# Each makes .venv and installs requirements.txt into it where that is not done yet.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"  # of the file itself, where a link leads to it

install() {
  case "$(uname -s)" in
    MINGW* | MSYS* | CYGWIN*)
      echo "error: on Windows, run this in WSL (a Linux in Windows)" >&2
      exit 2
      ;;
  esac
  if ! usable_venv; then
    find_python
    [ ! -e .venv ] || echo ".venv is of another folder, or of a Python that is gone: made anew"
    rm -rf .venv
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
  if ! cmp -s requirements.txt .venv/installed.txt; then
    if ! python -m pip --version >/dev/null 2>&1 && ! python -m ensurepip --upgrade >/dev/null; then
      echo "error: .venv has no pip; put one there (uv pip install pip), or delete .venv, and" \
        "call this again" >&2
      exit 2
    fi
    echo "installing requirements.txt into .venv (about 8 GB on Linux; a few minutes)"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
}

# Whether .venv is there and activating it gives its Python: not so after this folder was moved.
usable_venv() (
  # shellcheck disable=SC1091
  source .venv/bin/activate 2>/dev/null || exit 1
  prefix=$(python -c 'import sys; print(sys.prefix)' 2>/dev/null) && [ "$prefix" -ef .venv ]
)

find_python() {
  for python in python3 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
    then
      return
    fi
  done
  echo "error: no Python 3.11 to 3.13 found (there is no TensorFlow for later ones); install one" \
    "and call this again" >&2
  exit 2
}

# step 'COMMAND THAT TELLS WHETHER IT IS DONE' 'COMMAND': show the command, run it unless done.
step() {
  printf '\n$ %s\n' "$2"
  if eval "$1"; then
    echo "done already"
  else
    local started=$SECONDS
    eval "$2"
    echo "($((SECONDS - started)) s)"
  fi
}

# scored RUN SCRIPT: whether the run's results.json has the scores of a script.
scored() {
  grep -qs "\"$2\":" "model/$1/results.json"
}

# train RUN 'COMMAND': a training step, resumed where an earlier demo was stopped in the middle.
train() {
  local resume=""
  if [ -e "model/$1/state.pth" ] && ! scored "$1" train; then resume=" --resume"; fi
  step "scored $1 train" "$2$resume"
}

demo() {
  local data=data/demo/pytorch
  local gan="--dataset ../data/demo/bounding_box_train --checkpoint_dir ../data/demo/gan"
  local recipe="--data_dir $data --use_dense --pretrained none --height 64 --width 32"
  recipe+=" --batchsize 32 --recipe strong --epochs 5 --lr 0.1 --warm_epoch 1 --erasing_p 0"
  SECONDS=0

  step "[ -e data/demo/synthetic_market.json ]" \
    "python synthetic_market.py --output_dir data/demo"
  step "[ -d $data ]" \
    "python prepare.py --download_path data/demo"
  step "[ -e $data/class_index.json ]" \
    "python changeIndex.py --data_dir $data"

  # A narrow GAN at half the size: what two CPU cores train in one to three minutes.
  step "[ -e data/demo/gan/bounding_box_train/ckpt-0012.npz ]" \
    "(cd DCGAN-tensorflow && python main.py --train $gan --output_height 64 --output_width 32 \
--gf_dim 16 --df_dim 32 --batch_size 16 --epoch 12 --learning_rate 0.0004 \
--augment flip,translation --sample_dir ../data/demo/samples)"
  step "[ -d data/demo/generated ]" \
    "(cd DCGAN-tensorflow && python main.py --options 5 $gan --sample_size 200 \
--output_path ../data/demo/generated)"
  step "[ -d $data/train_new/gen_0000 ]" \
    "(cd DCGAN-tensorflow && python resizeImage.py --input_path ../data/demo/generated \
--output_path ../$data/train_new/gen_0000)"

  train demo_baseline "python train_baseline.py --name demo_baseline $recipe"
  train demo_lsro "python train_lsro.py --name demo_lsro --num_generated 200 $recipe"

  local name result
  for name in demo_baseline demo_lsro; do
    result="model/$name/pytorch_result.mat"
    step "[ -e $result ]" \
      "python test.py --name $name --test_dir $data --mat $result"
    step "scored $name evaluate" \
      "python evaluate.py $result --json model/$name/results.json --plot --show 6"
    step "scored $name evaluate_rerank" \
      "python evaluate_rerank.py $result --json model/$name/results.json"
  done

  printf '\n$ %s\n\n' "python evaluate.py model/demo_lsro/pytorch_result.mat --against model/demo_baseline/pytorch_result.mat"
  python evaluate.py model/demo_lsro/pytorch_result.mat \
    --against model/demo_baseline/pytorch_result.mat
  echo "One training of each can't tell whether generated images help: two trainings with other" \
    "--seeds differ, too. See docs/does-it-help.md"
  # From where on two images count as one person; then search a folder for the people on two crops.
  step "[ -e model/demo_baseline/threshold.json ]" \
    "python test.py --name demo_baseline --test_dir $data --val --mat model/demo_baseline/val.mat && \
python evaluate.py model/demo_baseline/val.mat --calibrate 0.001"
  step "false" \
    "python search.py --name demo_baseline --query data/demo/query/0359_c6s6_015957_00.jpg \
data/demo/query/0225_c6s5_036117_00.jpg --gallery data/demo/bounding_box_test \
--index model/demo_baseline/gallery.index --top 5 --output model/demo_baseline/search.jpg"

  printf '\n$ %s\n\n' "python results_table.py model/demo_baseline model/demo_lsro"
  python results_table.py model/demo_baseline model/demo_lsro
  printf '\n%s s. Pictures: %s\n' "$SECONDS" \
    "data/demo/contact_sheet.jpg, data/demo/samples/*.png, model/demo_*/*.jpg"
  echo "To start afresh: rm -r data/demo model/demo_*"
  echo "To search on a page (pip install gradio): python page.py --name demo_baseline" \
    "--index model/demo_baseline/gallery.index"
}

# run_tests [--quick] [PYTEST'S ARGUMENTS]
run_tests() {
  if [ "${1:-}" = --quick ]; then set -- -m "not slow" "${@:2}"; fi
  ruff check .
  ruff format --check .
  python -m pytest "$@"
}

case "${1:-}" in
  demo) install; demo ;;
  test) install; run_tests "${@:2}" ;;
  *) sed -n '2,10s/^# \{0,1\}//p' run.sh; exit 2 ;;
esac
