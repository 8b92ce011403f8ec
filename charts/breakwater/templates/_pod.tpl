{{- define "breakwater.pod" -}}
{{- $node := eq .Values.mode "node" -}}
{{- $sidecar := and $node .Values.containerd.enabled -}}
{{- $given := has (include "breakwater.dataType" .) (list "hostPath" "emptyDir") -}}
metadata:
  labels:
    {{- include "breakwater.selector" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: mirror
    checksum/config: {{ include "breakwater.config" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- if include "breakwater.hostNetwork" . }}
  hostNetwork: true
  {{- end }}
  # A node's mirror finds its upstreams without the cluster's DNS, which may itself wait for an image.
  dnsPolicy: {{ .Values.dnsPolicy | default (ternary "Default" "ClusterFirst" $node) }}
  serviceAccountName: {{ include "breakwater.serviceAccount" . }}
  automountServiceAccountToken: false
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with ternary (ternary "system-node-critical" "" $node) .Values.priorityClassName (kindIs "invalid" .Values.priorityClassName) }}
  priorityClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  securityContext:
    fsGroup: 65532
    # Not at each start: the store is the mirror's own from the first one on, and large.
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
    {{- with .Values.seLinuxOptions }}
    seLinuxOptions:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  {{- if or $given $sidecar }}
  initContainers:
    {{- if $given }}
    # The kubelet makes such a folder root's, or everybody's.
    - name: data
      image: {{ include "breakwater.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [setup, data, --owner, "65532:65532", --data, /var/lib/breakwater]
      securityContext:
        runAsUser: 0
        runAsGroup: 0
        {{- include "breakwater.confined" . | nindent 8 }}
          add: [CHOWN]
      volumeMounts:
        - {name: data, mountPath: /var/lib/breakwater}
    {{- end }}
    {{- if $sidecar }}
    # It goes on beside the mirror and ends after it, and then restores the node.
    - name: containerd
      image: {{ include "breakwater.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      restartPolicy: Always
      args:
        {{- include "breakwater.setup" . | nindent 8 }}
        - --hold
      # What has changed is written within 30 s.
      readinessProbe:
        exec:
          command:
            - /usr/bin/breakwater
            {{- include "breakwater.setup" . | nindent 12 }}
            - --check
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 5
      {{- with include "breakwater.addresses" . | trim }}
      env:
        {{- . | nindent 8 }}
      {{- end }}
      securityContext:
        # The folder is root's. Root without capabilities may write there, and nowhere else.
        runAsUser: 0
        runAsGroup: 0
        {{- include "breakwater.confined" . | nindent 8 }}
      resources:
        requests: {cpu: 5m, memory: 16Mi}
        limits: {memory: 64Mi}
      volumeMounts:
        {{- include "breakwater.configMounts" . | nindent 8 }}
        {{- if .Values.containerd.authorization.secret }}
        - {name: authorization, mountPath: /etc/breakwater/authorization, readOnly: true}
        {{- end }}
        - {name: certs-d, mountPath: {{ .Values.containerd.certsD | quote }}}
    {{- end }}
  {{- end }}
  containers:
    - name: mirror
      image: {{ include "breakwater.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve, --config, /etc/breakwater/breakwater.yaml]
      {{- with include "breakwater.env" . | trim }}
      env:
        {{- . | nindent 8 }}
      {{- end }}
      {{- with .Values.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: registry
          containerPort: {{ include "breakwater.port" (include "breakwater.listen" .) }}
          {{- if and $node (eq .Values.expose "hostPort") }}
          hostPort: {{ include "breakwater.hostPort" . }}
          hostIP: {{ .Values.hostPort.ip | quote }}
          {{- end }}
        - name: admin
          containerPort: {{ include "breakwater.port" (include "breakwater.admin" .) }}
      startupProbe:
        {{- include "breakwater.probe" (dict "root" . "path" "/healthz") | nindent 8 }}
        periodSeconds: 1
        failureThreshold: 60
      livenessProbe:
        {{- include "breakwater.probe" (dict "root" . "path" "/healthz") | nindent 8 }}
        timeoutSeconds: 5
      readinessProbe:
        {{- include "breakwater.probe" (dict "root" . "path" "/readyz") | nindent 8 }}
        timeoutSeconds: 5
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        {{- include "breakwater.confined" . | nindent 8 }}
      {{- with .Values.resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "breakwater.configMounts" . | nindent 8 }}
        - {name: data, mountPath: /var/lib/breakwater}
  volumes:
    {{- include "breakwater.configVolumes" . | nindent 4 }}
    {{- if $sidecar }}
    {{- with .Values.containerd.authorization.secret }}
    - name: authorization
      secret: {secretName: {{ . | quote }}, defaultMode: 0440}
    {{- end }}
    - name: certs-d
      hostPath: {path: {{ .Values.containerd.certsD | quote }}, type: DirectoryOrCreate}
    {{- end }}
    - name: data
      {{- include "breakwater.dataVolume" . | nindent 6 }}
  {{- with ternary (ternary (list (dict "operator" "Exists")) list $node) .Values.tolerations (kindIs "invalid" .Values.tolerations) }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if not $node }}
  {{- with .Values.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "breakwater.selector" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- end }}
{{- end -}}

{{/* How containerd is told of the mirror. */}}
{{- define "breakwater.setup" -}}
- setup
- containerd
- --config
- /etc/breakwater/breakwater.yaml
- --mirror
- {{ include "breakwater.url" . | quote }}
- --certs-d
- {{ .Values.containerd.certsD | quote }}
- --existing
- {{ .Values.containerd.existing }}
{{- if .Values.containerd.referrers }}
- --referrers
{{- end }}
{{- if .Values.ca.secret }}
- --ca
- {{ include "breakwater.ca" . }}
{{- end }}
{{- if .Values.containerd.authorization.secret }}
- --authorization
- {{ printf "/etc/breakwater/authorization/%s" .Values.containerd.authorization.key | quote }}
{{- end }}
{{- end -}}

{{- define "breakwater.env" -}}
{{- include "breakwater.addresses" . }}
{{- with dig "limits" "memory" "" (.Values.resources | default dict) }}
# Nine tenths of the limit: garbage is collected before the kernel ends the mirror.
- {name: GOMEMLIMIT, value: {{ mulf (include "breakwater.bytes" . | float64) 0.9 | int64 | toString | quote }}}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Where the store is: on the node by default, and for a region in a claim. */}}
{{- define "breakwater.dataType" -}}
{{- .Values.data.type | default (ternary "hostPath" "pvc" (eq .Values.mode "node")) -}}
{{- end -}}

{{- define "breakwater.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .Values.data.storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.data.size | quote }}
{{- end -}}

{{- define "breakwater.dataVolume" -}}
{{- $type := include "breakwater.dataType" . -}}
{{- if eq $type "hostPath" -}}
hostPath: {path: {{ .Values.data.path | quote }}, type: DirectoryOrCreate}
{{- else if eq $type "pvc" -}}
persistentVolumeClaim: {claimName: {{ .Values.data.existingClaim | default (include "breakwater.fullname" .) | quote }}}
{{- else if eq $type "ephemeral" -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      {{- include "breakwater.claim" . | nindent 6 }}
{{- else if .Values.data.size -}}
emptyDir: {sizeLimit: {{ .Values.data.size | quote }}}
{{- else -}}
emptyDir: {}
{{- end -}}
{{- end -}}

{{/* The configuration file, as `config` has it. */}}
{{- define "breakwater.config" -}}
{{- with .Values.config }}
{{- toYaml . }}
{{- else -}}
# The defaults hold: breakwater config example
{{- end }}
{{- end -}}
