{{- define "breakwater.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What a selector says: it cannot change in an upgrade. */}}
{{- define "breakwater.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: mirror
{{- end -}}

{{- define "breakwater.labels" -}}
{{ include "breakwater.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "breakwater.metadata" -}}
name: {{ include "breakwater.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "breakwater.labels" . | nindent 2 }}
{{- end -}}

{{- define "breakwater.image" -}}
{{- .Values.image.repository -}}
{{- with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- define "breakwater.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "breakwater.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* Whether the pod shares the node's network: "true" or nothing. */}}
{{- define "breakwater.hostNetwork" -}}
{{- if and (eq .Values.mode "node") (eq .Values.expose "hostNetwork") }}true{{ end -}}
{{- end -}}

{{/* Where the mirror listens; in a network of its own on all addresses, so that others reach it. */}}
{{- define "breakwater.listen" -}}
{{- .Values.config.listen | default (ternary "127.0.0.1:5000" "0.0.0.0:5000" (not (not (include "breakwater.hostNetwork" .)))) -}}
{{- end -}}

{{- define "breakwater.admin" -}}
{{- .Values.config.admin | default (ternary "127.0.0.1:5001" "0.0.0.0:5001" (not (not (include "breakwater.hostNetwork" .)))) -}}
{{- end -}}

{{/* Of an address, HOST:PORT. */}}
{{- define "breakwater.port" -}}
{{- splitList ":" . | last -}}
{{- end -}}

{{- define "breakwater.host" -}}
{{- . | trimSuffix (printf ":%s" (include "breakwater.port" .)) | trimPrefix "[" | trimSuffix "]" -}}
{{- end -}}

{{- define "breakwater.onLoopback" -}}
{{- if regexMatch "^(127\\.|localhost$|::1$)" (include "breakwater.host" .) }}true{{ end -}}
{{- end -}}

{{/* How an address is reached on its own host: a wildcard is none that could be dialled. */}}
{{- define "breakwater.near" -}}
{{- $host := include "breakwater.host" . -}}
{{- if has $host (list "" "0.0.0.0" "::" "localhost") }}127.0.0.1{{ else }}{{ $host }}{{ end -}}
{{- end -}}

{{/* The port of the node, in the modes that open one. */}}
{{- define "breakwater.hostPort" -}}
{{- .Values.hostPort.port | default (include "breakwater.port" (include "breakwater.listen" .)) -}}
{{- end -}}

{{/* The name of a regional mirror's Service. */}}
{{- define "breakwater.serviceName" -}}
{{- printf "%s.%s.svc" (include "breakwater.fullname" .) .Release.Namespace -}}
{{- end -}}

{{/* Where clients reach the mirror: a node's containerd, or pods; and `helm test`. */}}
{{- define "breakwater.url" -}}
{{- $scheme := ternary "https" "http" (not (not (dig "tls" "cert_file" "" .Values.config))) -}}
{{- $listen := include "breakwater.listen" . -}}
{{- if .Values.url -}}
{{- .Values.url | trimSuffix "/" -}}
{{- else if eq .Values.mode "regional" -}}
{{- printf "%s://%s:%v" $scheme (include "breakwater.serviceName" .) .Values.service.port -}}
{{- else if eq .Values.expose "nodePort" -}}
{{- printf "%s://127.0.0.1:%v" $scheme .Values.nodePort -}}
{{- else if eq .Values.expose "hostPort" -}}
{{- $ip := .Values.hostPort.ip -}}
{{- $near := ternary "127.0.0.1" $ip (has $ip (list "0.0.0.0" "::")) -}}
{{- printf "%s://%s:%v" $scheme (ternary (printf "[%s]" $near) $near (contains ":" $near)) (include "breakwater.hostPort" .) -}}
{{- else -}}
{{- $near := include "breakwater.near" $listen -}}
{{- printf "%s://%s:%s" $scheme (ternary (printf "[%s]" $near) $near (contains ":" $near)) (include "breakwater.port" $listen) -}}
{{- end -}}
{{- end -}}

{{/* Bytes of a quantity, as a whole number. */}}
{{- define "breakwater.bytes" -}}
{{- if not (kindIs "string" .) -}}
{{- printf "%d" (int64 .) -}}
{{- else -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $unit := regexFind "[A-Za-z]*$" . -}}
{{- $number := trimSuffix $unit . -}}
{{- if or (not (hasKey $units $unit)) (not (regexMatch "^[0-9]+(\\.[0-9]+)?$" $number)) -}}
{{- fail (printf "resources.limits.memory: %s: write it as 512Mi, 1.5Gi, 512M or in bytes, so that GOMEMLIMIT can be made of it" .) -}}
{{- end -}}
{{- printf "%d" (mulf (float64 $number) (get $units $unit) | int64) -}}
{{- end -}}
{{- end -}}

{{- define "breakwater.probe" -}}
{{- $admin := include "breakwater.admin" .root -}}
httpGet:
  path: {{ .path }}
  port: admin
  {{- if include "breakwater.hostNetwork" .root }}
  host: {{ include "breakwater.near" $admin | quote }}
  {{- end }}
{{- end -}}

{{/* What every container of ours may not do. */}}
{{- define "breakwater.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The settings that the chart adds where `config` is silent, for all that read the configuration. */}}
{{- define "breakwater.addresses" -}}
{{- if not (include "breakwater.hostNetwork" .) }}
{{- if not .Values.config.listen }}
- {name: BREAKWATER_LISTEN, value: {{ include "breakwater.listen" . | quote }}}
{{- end }}
{{- if not .Values.config.admin }}
- {name: BREAKWATER_ADMIN, value: {{ include "breakwater.admin" . | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* The file with the mirror's authority. */}}
{{- define "breakwater.ca" -}}
{{- printf "/etc/breakwater/ca/%s" .Values.ca.key | quote -}}
{{- end -}}

{{/* The configuration, its secrets, and the mirror's authority, for all that read them. */}}
{{- define "breakwater.configMounts" -}}
- {name: config, mountPath: /etc/breakwater, readOnly: true}
{{- range .Values.secrets }}
- {name: secret-{{ .name }}, mountPath: /etc/breakwater/secrets/{{ .name }}, readOnly: true}
{{- end }}
{{- if .Values.ca.secret }}
- {name: ca, mountPath: /etc/breakwater/ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "breakwater.configVolumes" -}}
- name: config
  configMap:
    name: {{ include "breakwater.fullname" . }}
{{- range .Values.secrets }}
- name: secret-{{ .name }}
  secret: {secretName: {{ .secret | quote }}, defaultMode: 0440}
{{- end }}
{{- with .Values.ca.secret }}
- name: ca
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- end -}}
