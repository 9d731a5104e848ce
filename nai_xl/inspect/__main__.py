"""python -m nai_xl.inspect"""

from nai_xl.inspect.combinations import main

if __name__ == "__main__":
    main()
