"""Run the train script of the library a config is for: python tools/train.py CONFIG --help."""

import sys

if __name__ == '__main__':
    try:
        from mmspatialmamba.engine.launch import leave, main
    except ModuleNotFoundError as error:
        sys.exit(f'train.py: {error}: README.md says how to install mmspatialmamba and what it needs')
    leave(main('train'))
