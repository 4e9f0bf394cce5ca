# An apt of its own in a directory: nothing is installed, no root needed. To be
# sourced; the calling script has a function `fail`.

# private_apt DIR KIND SUITE    read the package lists of a Debian suite
#
# DIR is absolute, KIND is deb or deb-src. `apt` then holds the command to call.
private_apt() {
    local dir=$1 kind=$2 suite=$3
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    type -P apt-get >/dev/null || fail "apt-get is needed"
    [ -e "$keyring" ] || fail "no $keyring (package debian-archive-keyring)"
    mkdir -p "$dir"/{lists/partial,archives/partial}
    : >"$dir/status"
    echo "$kind [signed-by=$keyring] http://deb.debian.org/debian $suite main" \
        >"$dir/sources.list"
    apt=(
        apt-get -qq
        -o Dir::State="$dir"
        -o Dir::State::status="$dir/status"
        -o Dir::Cache="$dir"
        -o Dir::Etc::SourceList="$dir/sources.list"
        -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null
        -o Dir::Etc::PreferencesParts=/dev/null
        -o APT::Install-Recommends=false
        -o Acquire::Languages=none
        -o APT::Sandbox::User="$(id -un)"
    )
    "${apt[@]}" update || fail "no package lists of $suite"
}
