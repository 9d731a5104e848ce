"""python -m nai_xl.compare"""

from nai_xl.compare.report import main

if __name__ == "__main__":
    main()
