#!/usr/bin/env bash
# The two commands of this project:
#
#   ./run.sh demo    the whole pipeline on a small rendered dataset, ending in a table
#   ./run.sh test    linter and tests
#
# Both make .venv and install requirements.txt into it where that is not done yet.
set -euo pipefail
cd "$(dirname "$0")"

install() {
  if [ ! -x .venv/bin/python ]; then
    find_python
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
  if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "installing requirements.txt into .venv (about 8 GB on Linux; a few minutes)"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
}

find_python() {
  for python in python3 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; install one and call this again" >&2
  exit 2
}

# step 'COMMAND THAT TELLS WHETHER IT IS DONE' 'COMMAND': show the command, run it unless done.
step() {
  printf '\n$ %s\n' "$2"
  if eval "$1"; then
    echo "done already"
  else
    eval "$2"
  fi
}

# scored RUN SCRIPT: whether the run's results.json has the scores of a script.
scored() {
  grep -qs "\"$2\":" "model/$1/results.json"
}

# train RUN 'COMMAND': a training step, resumed where an earlier demo was stopped in the middle.
train() {
  local resume=""
  if [ -e "model/$1/state.pth" ]; then resume=" --resume"; fi
  step "scored $1 train" "$2$resume"
}

demo() {
  local data=data/demo/pytorch gan="--dataset ../data/demo/bounding_box_train"
  local size="--height 128 --width 64"
  local recipe="--use_dense --pretrained none $size --batchsize 32 --epochs 8 --lr 0.05"
  SECONDS=0

  step "[ -e data/demo/synthetic_market.json ]" "python synthetic_market.py --output_dir data/demo"
  step "[ -d $data ]" "python prepare.py --download_path data/demo"
  step "[ -e $data/class_index.json ]" "python changeIndex.py --data_dir $data"
}

case "${1:-}" in
  demo) install; demo ;;
  test) install; ruff check .; ruff format --check .; python -m pytest ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
