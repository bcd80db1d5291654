"""A run as one page, `python -m pretrain.report OUT_DIR`: `runs` reads its log, `findings` judges, `page` shows."""
