"""A stand-in for train.py: its val_bpb is a plain function of its constants."""

import prepare

DEPTH = 4
WIDTH = 64
LEARNING_RATE = 0.02
SECONDS = 0.0


def main():
    val_bpb = 1 + 1 / WIDTH + abs(DEPTH - 6) / 100 + abs(LEARNING_RATE - 0.05)
    prepare.finish(val_bpb, SECONDS)


if __name__ == "__main__":
    main()
