"""python -m nai_xl.sample"""

from nai_xl.sample.paint import main

if __name__ == "__main__":
    main()
