{{- define "castellan.image" -}}
{{- printf "%s/%s:%s" (.context.Values.image.registry | trimSuffix "/") .name (.context.Values.image.tag | default .context.Chart.AppVersion) -}}
{{- end -}}

{{- define "castellan.labels" -}}
app.kubernetes.io/name: castellan
app.kubernetes.io/instance: {{ .context.Release.Name }}
app.kubernetes.io/version: {{ .context.Values.image.tag | default .context.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: castellan
app.kubernetes.io/managed-by: {{ .context.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .context.Chart.Name .context.Chart.Version | replace "+" "_" }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- /* Of pods: nothing that changes with the chart's version alone, which would restart
them. What users add never replaces what selectors and policies rely on. */ -}}
{{- define "castellan.podLabels" -}}
{{- $own := dict
  "app" (printf "castellan-%s" .component)
  "app.kubernetes.io/name" "castellan"
  "app.kubernetes.io/instance" .context.Release.Name
  "app.kubernetes.io/component" .component
  "sidecar.istio.io/inject" "false" -}}
{{- toYaml (merge $own .labels) -}}
{{- end -}}

{{- define "castellan.rootNamespace" -}}
{{- .Values.mesh.rootNamespace | default .Release.Namespace -}}
{{- end -}}

{{- define "castellan.pullSecrets" -}}
{{- range .Values.image.pullSecrets }}
- name: {{ . }}
{{- end }}
{{- end -}}

{{- /* What every container of ours may do: nothing. */ -}}
{{- define "castellan.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* Settings that contradict each other, said before anything is applied. */ -}}
{{- define "castellan.refuse" -}}
{{- if and (gt (int .Values.server.replicas) 1) (eq .Values.ledger.type "sqlite") -}}
{{- fail "server.replicas: the ledger is on SQLite, which one server writes; set server.replicas to 1" -}}
{{- end -}}
{{- end -}}
