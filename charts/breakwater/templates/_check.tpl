{{/* What cannot work together, and what to write instead. The rest is said by values.schema.json, and of
what is in `config`, by the mirror itself. */}}
{{- define "breakwater.check" -}}
{{- $node := eq .Values.mode "node" -}}
{{- $hostNetwork := include "breakwater.hostNetwork" . -}}
{{- $listen := include "breakwater.listen" . -}}
{{- $admin := include "breakwater.admin" . -}}
{{- $type := include "breakwater.dataType" . -}}
{{- if .Values.config.data -}}
{{- fail "config.data: the store is mounted at /var/lib/breakwater; take it away, and write its place on the node as data.path" -}}
{{- end -}}
{{- range .Values.env -}}
{{- if hasPrefix "BREAKWATER_" .name -}}
{{- fail (printf "env: %s overrides the configuration for the mirror alone, and not for what points containerd at it; write it in config" .name) -}}
{{- end -}}
{{- end -}}
{{- if and (not $hostNetwork) (include "breakwater.onLoopback" $listen) -}}
{{- fail (printf "config.listen: nobody reaches %s in a network of the pod's own; take it away, or write 0.0.0.0:5000" $listen) -}}
{{- end -}}
{{- if and (not $hostNetwork) (include "breakwater.onLoopback" $admin) -}}
{{- fail (printf "config.admin: the kubelet's probes do not reach %s in a network of the pod's own; take it away, or write 0.0.0.0:5001" $admin) -}}
{{- end -}}
{{- if not (or .Values.config.access (include "breakwater.onLoopback" $listen)) -}}
{{- fail (printf "config.access: missing, and the mirror listens on %s, beyond loopback; write `config: {access: {anonymous: true}}` for everybody, or htpasswd, token or client_ca_file there" $listen) -}}
{{- end -}}
{{- include "breakwater.checkURL" . -}}
{{- if and .Values.ca.secret (hasPrefix "http:" (include "breakwater.url" .)) -}}
{{- fail (printf "ca.secret: clients call the mirror %s, without TLS; write config.tls, or take it away" (include "breakwater.url" .)) -}}
{{- end -}}
{{- if and $node (eq .Values.expose "nodePort") (semverCompare "<1.34.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "expose: nodePort needs Kubernetes 1.34, where a Service can prefer the client's own node, and this is %s; write hostNetwork or hostPort" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and $node (eq $type "pvc") -}}
{{- fail "data.type: a DaemonSet's pods cannot share one claim; write hostPath, or ephemeral for a claim of each pod's own" -}}
{{- end -}}
{{- if and (not $node) (eq $type "hostPath") -}}
{{- fail "data.type: a regional mirror is not bound to a node whose hostPath it could find again; write pvc, or ephemeral" -}}
{{- end -}}
{{- if and (not $node) (eq $type "pvc") (ne (int .Values.replicas) 1) -}}
{{- fail (printf "replicas: %d cannot share one claim, whose store has one owner; write 1, or data.type: ephemeral for a claim of each replica's own" (int .Values.replicas)) -}}
{{- end -}}
{{- if and (or (eq $type "ephemeral") (and (eq $type "pvc") (not .Values.data.existingClaim))) (not .Values.data.size) -}}
{{- fail (printf "data.size: missing; write how large the claim of data.type %s is, such as 100Gi" $type) -}}
{{- end -}}
{{- if and (eq $type "emptyDir") .Values.data.size (not .Values.config.capacity) -}}
{{- fail "config.capacity: missing, and the kubelet evicts a pod whose emptyDir is over data.size; write about nine tenths of that" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled $hostNetwork -}}
{{- fail "networkPolicy.enabled: has no effect on the node's own network; write false, or expose: hostPort" -}}
{{- end -}}
{{- if and (or .Values.podMonitor.enabled .Values.serviceMonitor.enabled) (include "breakwater.onLoopback" $admin) -}}
{{- fail (printf "config.admin: Prometheus does not reach %s; write 0.0.0.0:5001, where everybody who reaches the node may read metrics and change nothing, or take the monitor away" $admin) -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (ne .Values.service.type "ClusterIP") -}}
{{- fail (printf "serviceMonitor.enabled: would open the metrics' port wherever a Service of type %s is reached; write podMonitor" .Values.service.type) -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled $node -}}
{{- fail "serviceMonitor.enabled: a mirror on each node has no Service to be scraped by; write podMonitor" -}}
{{- end -}}
{{- end -}}

{{/* The mirror answers for an address of its own with the port that it listens on, and for the names that it
was told: others could be a page's that was rebound to it. */}}
{{- define "breakwater.checkURL" -}}
{{- $url := urlParse (include "breakwater.url" .) -}}
{{- $listen := include "breakwater.listen" . -}}
{{- $port := splitList ":" $url.host | last -}}
{{- $name := $url.hostname -}}
{{- $near := or (eq $name "localhost") (eq $name "::1") (hasPrefix "127." $name) (eq $name (include "breakwater.host" $listen)) -}}
{{- $samePort := eq $port (include "breakwater.port" $listen) -}}
{{- $names := .Values.config.server_names | default list -}}
{{- if not (or (and $near $samePort) (has $name $names) (hasKey (.Values.config.hosts | default dict) $name)) -}}
{{- fail (printf "config.server_names: clients call the mirror %s, a name that it does not know for its own; write `config: {server_names: [%s]}`" $url.host (append $names $name | join ", ")) -}}
{{- end -}}
{{- end -}}
