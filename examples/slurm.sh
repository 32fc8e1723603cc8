#!/bin/bash
# Extraction on a SLURM cluster: every task of the array extracts one part of the videos.
#
#     sbatch --array=0-15 examples/slurm.sh /data/videos /data/features
#     sbatch --array=0-15 examples/slurm.sh /data/videos /data/features --modality rgb,flow
#
# Submitting the same line again resumes: what is up to date is skipped. Submit the whole array, for
# the number of its tasks is the number of parts. In the end `mmdist status FEATURES` says what is
# missing, and `mmdist extract --list FEATURES/failed.txt --out FEATURES` tries the failed videos
# again.

#SBATCH --job-name=mmdist
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=mmdist-%A_%a.log

set -euo pipefail

videos=${1:?give the folder of the videos}
features=${2:?give the folder for the features}
shift 2

# An array may begin at any number and have steps; parts are numbered from 0.
index=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
count=${SLURM_ARRAY_TASK_COUNT:-1}

# exec: SLURM's SIGTERM before the end of the time reaches mmdist, which ends within seconds.
exec mmdist extract "$videos" --out "$features" --shard "$index/$count" "$@"
