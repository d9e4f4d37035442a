"""The chat page, for any OpenAI-compatible URL: python apps/chat.py --base-url http://127.0.0.1:8000/v1"""

import sys

from ds_serve.chat.run import main

if __name__ == "__main__":
    sys.exit(main())
