# shellcheck shell=bash
# What the scripts find out about utils.py without Python. Needs $root and the function die.

# check_model NAME: end if MODELS in utils.py is written out and lacks it, or if there is no file
# here for a model of the user's own (mine:Mine)
check_model() {
  local names own
  if [[ $1 == *:* ]]; then
    own=$(model_file "$1")
    [[ -f $own ]] || die "--model $1: there is no $own in '$PWD'"
    return
  fi
  # shellcheck disable=SC2154 # root is the script's
  names=$(sed -n '/^MODELS.*}/p; /^MODELS[^}]*$/,/}/p' "$root/utils.py" | grep -o '"[^"]*":' | tr -d '":') || names=''
  [[ -z $names || $'\n'$names$'\n' == *$'\n'$1$'\n'* ]] ||
    grep -qF -e "\"$1\"" -e "'$1'" "$root/utils.py" || # added elsewhere in the file
    die "no model '$1'; utils.MODELS has ${names//$'\n'/, }"
}

# model_file NAME: the file of a user's own model, in the working directory
model_file() {
  local module=${1%%:*}
  echo "${module//.//}.py"
}
