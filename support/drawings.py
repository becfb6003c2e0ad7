"""drawings"""


# The built-in set. Per class: the background, then strokes of shape, paint and points (x y x y ... from the centre, in
# twentieths of the radius). A paint is #colour or texture#colour#colour; every texture alternates from pixel to pixel.
SCENES = {
    "balloon": "#adf; oval #fff -24 -2 -10 4; oval #fff 12 -15 24 -10; line #432 -8 2 -3 15 0 6 3 15 8 2;"
        "oval cols#c24#fc6 -14 -20 14 8; box check#642#da6 -4 14 4 19",
    "book": "#843; poly #347 -20 -13 0 -11 20 -13 20 15 0 17 -20 15; poly #fed -19 -15 0 -12 19 -15 19 13 0 15 -19 13;"
        "line #ba8 0 -12 0 15; box text#fed#545 -16 -10 -2 10; box text#fed#545 3 -10 17 10",
    "butterfly": "#cd6; line #324 -7 -20 0 -10 7 -20; oval check#739#e9d -20 -16 0 4; oval check#739#e9d 0 -16 20 4;"
        "oval rows#d59#fd9 -15 0 0 16; oval rows#d59#fd9 0 0 15 16; oval #fec -14 -10 -8 -4; oval #fec 8 -10 14 -4;"
        "oval #324 -2 -12 2 15",
    "cat": "#ebc; poly #b62 -16 -4 -15 -20 0 -9 15 -20 16 -4; oval rows#ea5#952 -17 -14 17 16; oval #fed -8 2 8 13;"
        "oval #595 -11 -6 -4 2; oval #595 4 -6 11 2; oval #112 -9 -5 -6 1; oval #112 6 -5 9 1; poly #c56 -2 3 2 3 0 6;"
        "line #632 0 6 0 9; line #fff 22 4 6 8 22 10; line #fff -22 4 -6 8 -22 10",
    "city": "#225; oval #eec 8 -18 17 -9; box dots#338#fd6 -20 -7 -8 40; box dots#448#fd6 8 -2 21 40;"
        "box cols#348#cb8 -7 -17 6 40; line #eec 0 -17 0 -25",
    "donut": "#6cb; oval #b74 -19 -18 19 19; oval dots#fbc#a15 -17 -18 17 14; oval #b74 -7 -7 7 6; oval #6cb -6 -4 6 6",
    "fish": "#27a; oval #bef -20 -17 -16 -13; oval #bef -16 -22 -14 -20; poly rows#fb4#c42 8 0 21 -12 18 0 21 12;"
        "poly #e62 -4 -8 6 -17 6 -6; oval check#fc4#c52 -19 -11 12 11; oval #fc4 -19 -8 -8 8; oval #fff -15 -5 -10 0;"
        "oval #112 -14 -4 -11 -1; line #831 -17 4 -12 4",
    "house": "#fd9; box #7a5 -99 16 99 99; box #889 8 -18 12 -4; poly check#335#568 -21 -2 0 -20 21 -2;"
        "box rows#b43#eca -17 -2 17 17; box #532 -3 6 3 17; box cols#fe8#67a -12 3 -6 10; box cols#fe8#67a 6 3 12 10",
    "mushroom": "#254; box #142 -99 16 99 99; poly cols#fed#b97 -5 0 5 0 7 19 -7 19;"
        "poly dots#d23#fee -20 0 -17 -11 -8 -18 8 -18 17 -11 20 0; oval #fee -11 -11 -4 -4; oval #fee 3 -15 11 -8",
    "tree": "#feb; box #da6 -99 16 99 99; box cols#742#c96 -3 4 3 19; oval dots#273#bd6 -20 -10 2 9;"
        "oval dots#273#bd6 -2 -10 20 9; oval dots#284#ce7 -12 -20 12 4; oval #d33 -10 0 -6 4; oval #d33 8 -2 12 2",
}


SHAPES = {"oval": "ellipse", "box": "rectangle", "poly": "polygon", "line": "line"}


LETTERS = ("# #  #  ###   ", "# # # # #     ", "# # ### ##    ", "# # # # #     ", " #  # # ###   ", " " * 14)
