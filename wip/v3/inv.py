import re,sys
L=[l for l in open(sys.argv[1]).read().splitlines()]
seen=set()
# find loops: backward branches containing HGMMA
lab={}
for i,l in enumerate(L):
    m=re.match(r"^(\.L_x_\d+):",l.strip())
    if m: lab[m[1]]=i
for i,l in enumerate(L):
    m=re.search(r"BRA `\((\.L_x_\d+)\)",l)
    if m and lab.get(m[1],1e9)<i:
        body=L[lab[m[1]]:i+1]
        if sum("HGMMA" in b for b in body)!=32 or (k:=next(j for j,b in enumerate(L) if j>=lab[m[1]] and 'HGMMA' in b)) in seen: continue
        seen.add(k)
        w=set();r={};
        for b in body:
            t=re.sub(r"/\*.*?\*/","",b).strip()
            t=re.sub(r"^@!?U?P\d+\s+","",t)
            mm=re.match(r"([A-Z0-9_.]+)\s+(.*);",t)
            if not mm: continue
            op,args=mm[1],mm[2].split(", ")
            regs=lambda s:re.findall(r"\b(U?R\d+)\b",s)
            st=op.startswith(("ST","SYNCS","BAR","UTMA","BRA","RED"))
            srcs=args if st else args[1:]
            for a in srcs:
                for x in regs(a): r.setdefault(x,[]).append(op.split(".")[0])
            if not st:
                for x in regs(args[0]): w.add(x)
        inv={x:sorted(set(o)) for x,o in r.items() if x not in w}
        print("loop",m[1],"lines",len(body),"STL/LDL",sum(("STL" in b) or ("LDL" in b) for b in body),"DEPBAR",sum("WARPGROUP.DEPBAR" in b for b in body))
        print("  written R:",len([x for x in w if x[0]=="R"])," invariant:",{k:v for k,v in sorted(inv.items())if k[0]=="R"})
        print("  inv U:",len([k for k in inv if k[0]=="U"]), "written U",len([k for k in w if k[0]=='U']))
