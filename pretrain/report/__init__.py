"""A run as one page, `python -m pretrain.report OUT_DIR`: `runs` reads, `findings` judges, `page`
shows."""
