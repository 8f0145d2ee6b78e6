#!/bin/sh
# SORT inside verl, on one node with 8 GPUs of 80 GB. More settings can follow on the command line.
# train.parquet and test.parquet: see prepare.py.
set -e
python3 -m verl.trainer.main_ppo \
  trainer.v1.trainer_mode=handrail \
  algorithm.adv_estimator=handrail \
  +algorithm.handrail.method=sort \
  data.train_files=train.parquet \
  data.val_files=test.parquet \
  data.train_batch_size=128 \
  data.max_prompt_length=1024 \
  data.max_response_length=3072 \
  actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-7B-Instruct \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
  algorithm.rollout_correction.rollout_is=token \
  trainer.project_name=handrail \
  trainer.experiment_name=sort \
  trainer.nnodes=1 \
  trainer.n_gpus_per_node=8 \
  trainer.total_epochs=5 \
  trainer.save_freq=50 \
  trainer.test_freq=25 \
  'trainer.logger=[console,tensorboard]' \
  "$@"
