"""python -m nai_xl.plan"""

from nai_xl.plan.command import main

if __name__ == "__main__":
    main()
