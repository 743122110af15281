import json,sys
a=json.load(open('base.json')); b=json.load(open(sys.argv[1]))
for k in b:
    if a.get(k)!=b[k]: print(k, a.get(k), b[k], sep="\n   ")
print(len(b), "of", len(a))
