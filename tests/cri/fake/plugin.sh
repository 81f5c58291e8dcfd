#!/bin/sh
# Takes the place of a CNI plugin; what it is called is its type. Every call is a line of `calls` in the directory above
# (type, verb, sandbox, interface, netns), its stdin is kept in `requests`. The plugin `first` gives an address for as
# long as it has a file in `leases`. A file TYPE.VERB beside the plugin is sourced first: there it is told to fail or wait.
here=${0%/*}
type=${0##*/}
above=${here%/*}
request=$(cat)
[ "$CNI_COMMAND" = VERSION ] && {
    echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}'
    exit
}
echo "$type $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME ${CNI_NETNS:--} $CNI_ARGS" >> "$above/calls"
printf '%s' "$request" > "$above/requests/$type.$CNI_COMMAND"
fail() {
    printf '{"cniVersion": "1.0.0", "code": %s, "msg": "%s", "details": "%s"}' "$1" "$2" "$3"
    exit 1
}
[ -f "$here/$type.$CNI_COMMAND" ] && . "$here/$type.$CNI_COMMAND"
lease=$above/leases/$CNI_CONTAINERID-$CNI_IFNAME
case "$type $CNI_COMMAND" in
'first ADD') : > "$lease" ;;
'first DEL') rm -f "$lease" ;;
esac
[ "$CNI_COMMAND" = ADD ] && printf '{
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "%s", "mac": "02:00:00:00:00:01", "sandbox": "%s"}],
    "ips": [{"address": "10.88.0.5/24", "interface": 0}, {"address": "fd00::5/64", "interface": 0}]
}' "$CNI_IFNAME" "$CNI_NETNS"
exit 0
